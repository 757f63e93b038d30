//! Models come from a bucket, a hub, a registry and a web server, with credentials in Secrets; each failure
//! has its reason and its fix in the model's conditions.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, api::PostParams};
use serde_json::{Value, json};
use trustformers_e2e::{
    model::{conditions, status_text},
    request::Request,
    scenario::{Scenario, run},
    sources::{HUGGING_FACE_TOKEN, REGISTRY_LOGIN, S3_KEYS, SourceServer},
    wait::Until,
};

/// From apply to ready: 100 MB over the cluster's network, four pods at a time on a small machine.
const READY_LIMIT_S: u64 = 90;
/// From apply to the reason; a mount is reported once kubelet has tried it twice.
const REASON_LIMIT_S: u64 = 60;
/// The Secret's key with the certificate authority, and where a pod mounts it.
const AUTHORITY: &str = "ca.crt";
const AUTHORITY_FILE: &str = "/etc/trustformers-source/ca.crt";

#[tokio::test]
async fn models_come_from_every_kind_of_source() -> Result<()> {
    run("sources", async |scenario| {
        // Given: servers that pods can reach, and a Secret with the credentials of each.
        let server = server(scenario).await?;
        let fixture = Fixture { scenario, server: &server };
        fixture.secret("bucket", &S3_KEYS).await?;
        fixture.secret("hub", &[HUGGING_FACE_TOKEN]).await?;
        fixture.secret("registry", &REGISTRY_LOGIN).await?;
        fixture.secret("web", &[]).await?;

        // When: a model of each source is applied.
        let bucket = json!({"uri": "s3://bucket/models", "secretRef": {"name": "bucket"}});
        fixture.apply("bucket", bucket).await?;
        let repository = json!({"uri": "hf://org/tiny", "revision": "main", "secretRef": {"name": "hub"}});
        fixture.apply("hub", repository).await?;
        let pulled = format!("oci://{}/org/model:v1", server.address);
        let pulled = json!({"uri": pulled, "oci": "Pull", "secretRef": {"name": "registry"}});
        fixture.apply("pulled", pulled).await?;
        let web = json!({
            "uri": format!("https://{}/files/{}", server.address, server.file),
            "sha256": server.sha256,
            "secretRef": {"name": "web"},
            "cache": {"emptyDir": {"sizeLimit": "1Gi"}},
        });
        fixture.apply("web", web).await?;

        // Then: each becomes ready with the file's digest, and answers through the gateway.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        for name in ["bucket", "hub", "pulled", "web"] {
            let model = models.ready(name, READY_LIMIT_S).await?;
            assert_eq!(status_text(&model, "/digest"), server.sha256, "{name}");
            let answer = gateway.http(&Request::new(&models.full_name(name), "Hello", 2)).await?;
            assert!(!answer.tokens.is_empty(), "{name}: {answer:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn each_failure_of_a_source_has_its_reason_and_its_fix() -> Result<()> {
    run("source-failures", async |scenario| {
        // Given: servers that pods can reach, and a Secret with a wrong key.
        let server = server(scenario).await?;
        let fixture = Fixture { scenario, server: &server };
        fixture.secret("web", &[]).await?;
        fixture.secret("wrong", &[S3_KEYS[0], (S3_KEYS[1].0, "wrong")]).await?;
        fixture.secret("right", &S3_KEYS).await?;

        // When: models are applied that cannot be fetched.
        let of_web = |path: &str| {
            let uri = format!("https://{}/{path}/{}", server.address, server.file);
            json!({"uri": uri, "secretRef": {"name": "web"}})
        };
        let bucket = |secret: &str| json!({"uri": "s3://bucket/models", "secretRef": {"name": secret}});
        fixture.apply("refused", bucket("wrong")).await?;
        fixture.apply("private", of_web("private")).await?;
        fixture.apply("nowhere", of_web("none")).await?;
        fixture.apply("secretless", bucket("not-there")).await?;
        let mut small = of_web("files");
        small["cache"] = json!({"emptyDir": {"sizeLimit": "16Mi"}});
        fixture.apply("small", small).await?;

        // Then: conditions say which, and what to do.
        fixture.fails("refused", &["AccessDenied", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"]).await?;
        fixture.fails("private", &["Unauthorized", "SOURCE_TOKEN"]).await?;
        fixture.fails("nowhere", &["SourceNotFound", &server.file]).await?;
        fixture.fails("small", &["DiskFull", "/var/cache/trustformers"]).await?;
        fixture.fails("secretless", &["FailedMount", "not-there"]).await?;

        // When: the model names the Secret with the right key. Then: it is ready.
        let models = scenario.models();
        models.change("refused", json!({"source": {"secretRef": {"name": "right"}}})).await?;
        models.ready("refused", READY_LIMIT_S).await?;
        Ok(())
    })
    .await
}

/// Servers with SmolLM2.
pub(crate) async fn server(scenario: &Scenario) -> Result<SourceServer> {
    let file = scenario.cluster.settings.cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    SourceServer::start(&scenario.cluster, &file).await.context("the servers of sources")
}

/// The models of one scenario, which share its namespace and the server.
pub(crate) struct Fixture<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) server: &'a SourceServer,
}

impl Fixture<'_> {
    /// A Secret with these variables and the server's certificate authority.
    pub(crate) async fn secret(&self, name: &str, variables: &[(&str, &str)]) -> Result<()> {
        let authority = [(AUTHORITY, self.server.authority.as_str())];
        let data: BTreeMap<String, String> = variables
            .iter()
            .chain(&authority)
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let mut secret = Secret { string_data: Some(data), ..Secret::default() };
        secret.metadata.name = Some(name.to_owned());
        let secrets: Api<Secret> =
            Api::namespaced(self.scenario.cluster.client.clone(), &self.scenario.namespace);
        secrets.create(&PostParams::default(), &secret).await.context("could not make a Secret")?;
        Ok(())
    }

    /// The spec of a model of this source, whose pods ask our servers instead of those of the cloud.
    pub(crate) fn spec(&self, source: Value) -> Value {
        let endpoint = format!("https://{}", self.server.address);
        let env = json!([
            {"name": "AWS_ENDPOINT_URL", "value": endpoint},
            {"name": "HF_ENDPOINT", "value": endpoint},
            {"name": "SSL_CERT_FILE", "value": AUTHORITY_FILE},
        ]);
        json!({"source": source, "runtime": {"contextTokens": 256, "env": env}})
    }

    /// A model of this source.
    async fn apply(&self, name: &str, source: Value) -> Result<()> {
        self.scenario.models().apply(name, self.spec(source)).await.map(drop)
    }

    /// A condition of the model that is not true has all of these words.
    async fn fails(&self, name: &str, words: &[&str]) -> Result<()> {
        let what = format!("{name} reports {}", words.join(", "));
        let find = |model: &_| {
            let texts = conditions(model)
                .into_iter()
                .filter(|it| it.status != "True")
                .map(|it| format!("{} {}", it.reason, it.message));
            texts.into_iter().find(|text| words.iter().all(|word| text.contains(word)))
        };
        let found = self.scenario.models().until(name, Until::new(&what, REASON_LIMIT_S), find).await?;
        eprintln!("{name}: {found}");
        Ok(())
    }
}
