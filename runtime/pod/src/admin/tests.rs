//! The admin port over real connections.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;
use tonic::{Code, Request as GrpcRequest};
use trustformers_model::seeded::SeededModel;
use trustformers_plan::Backend;
use trustformers_plan::oracle::Oracle;
use trustformers_proto::v1::model_service_client::ModelServiceClient;
use trustformers_proto::v1::{
    ListModelsRequest, ModelState, RollbackModelRequest, SlotRole, SwapModelRequest,
};
use trustformers_store::Source;

use super::token::tests::Cluster;
use super::*;
use crate::control::ModelControl;
use crate::faults::Faults;
use crate::process::{Drain, Listen, Process, Settings, Sight};
use crate::spec::ModelSpec;

/// A pod of the operator that serves revision `r1` of `m` and has an admin port.
async fn start(cluster: &Cluster) -> Process {
    let file = |seed: u64| cluster.folder.path().join(format!("seed-{seed}.gguf"));
    for seed in [1, 2] {
        std::fs::write(file(seed), SeededModel { seed, ..SeededModel::default() }.gguf()).unwrap();
    }
    let mut spec = ModelSpec::new("m", Source::from_path(file(1)));
    spec.revision = "r1".into();
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let settings = Settings {
        models: vec![spec],
        listen: Listen { http: any, grpc: any, metrics: None, allowed_origins: AllowedOrigins::Any },
        drain: Drain { quiet: Duration::ZERO, timeout: Duration::from_secs(60) },
        model_control: ModelControl::Operator,
        admin: Some(AdminSettings {
            address: any,
            tokens: cluster.rules(),
            pod_config: None,
            defaults: LoadDefaults::default(),
        }),
        sight: Sight::default(),
        faults: Faults::default(),
    };
    let open = Box::new(|_: &ModelSpec| Ok(Box::new(Oracle::new()) as Box<dyn Backend>));
    let process = Process::start(settings, prometheus::Registry::new(), open).await.unwrap();
    let mut readiness = process.models().readiness();
    readiness.wait_for(|verdict| verdict.ok).await.unwrap();
    process
}

/// The answer to a POST, with a token or without.
async fn post(address: SocketAddr, path: &str, token: Option<&str>, body: &str) -> String {
    let token = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{token}content-length: {length}\r\n\r\n{body}"
    );
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    connection.read_to_string(&mut text).await.unwrap();
    text
}

fn with_token<T>(message: T, token: &str) -> GrpcRequest<T> {
    let mut request = GrpcRequest::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_the_token_changes_what_a_pod_serves_and_nobody_else() {
    let cluster = Cluster::new();
    let process = start(&cluster).await;
    let (admin, token) = (process.admin_address().unwrap(), cluster.token(&json!({})));
    let path = cluster.folder.path().join("seed-2.gguf");
    let load = json!({"name": "m", "revision": "r2", "path": path.to_str().unwrap()}).to_string();

    let refused = post(admin, "/v1/models/load", None, &load).await;
    assert!(refused.starts_with("HTTP/1.1 401") && refused.contains("www-authenticate: Bearer"), "{refused}");
    let expired = cluster.token(&json!({"exp": 1}));
    let refused = post(admin, "/v1/models/load", Some(&expired), &load).await;
    assert!(refused.starts_with("HTTP/1.1 401") && refused.contains("ExpiredSignature"), "{refused}");
    let refused = post(process.http_address(), "/v1/models/load", Some(&token), &load).await;
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("InferenceModel"), "{refused}");
    let missing = post(admin, "/v1/generate", Some(&token), r#"{"prompt": "a"}"#).await;
    assert!(missing.starts_with("HTTP/1.1 404"), "{missing}");

    let loaded = post(admin, "/v1/models/load", Some(&token), &load).await;
    assert!(loaded.starts_with("HTTP/1.1 200") && loaded.contains("\"role\":\"candidate\""), "{loaded}");
    let channel = Channel::from_shared(format!("http://{admin}")).unwrap().connect().await.unwrap();
    let mut client = ModelServiceClient::new(channel);
    let status = client.list_models(ListModelsRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(status.metadata().get("trustformers-error").unwrap(), "unauthenticated");
    let listed = client.list_models(with_token(ListModelsRequest {}, &token)).await.unwrap().into_inner();
    let slots = &listed.models[0].slots;
    assert_eq!((slots.len(), slots[1].state(), slots[1].role()), (2, ModelState::Ready, SlotRole::Candidate));

    let swap = SwapModelRequest {
        model: "m".into(),
        digest: slots[1].digest.clone(),
        expected_digest: slots[0].digest.clone(),
        ..SwapModelRequest::default()
    };
    for _ in 0..2 {
        let swapped = client.swap_model(with_token(swap.clone(), &token)).await.unwrap().into_inner();
        assert_eq!(swapped.model.unwrap().revision, "r2");
    }
    let rollback = RollbackModelRequest { model: "m".into(), expected_digest: slots[1].digest.clone() };
    for _ in 0..2 {
        let back = client.rollback_model(with_token(rollback.clone(), &token)).await.unwrap().into_inner();
        assert_eq!(back.model.unwrap().revision, "r1");
    }
    let again = RollbackModelRequest { model: "m".into(), ..RollbackModelRequest::default() };
    let status = client.rollback_model(with_token(again, &token)).await.unwrap_err();
    assert!(status.code() == Code::Aborted && status.message().contains("no version before"), "{status:?}");
    drop(client);
    assert!(process.drain().await);
}
