//! Object stores: small servers that speak as much of S3, Google Cloud Storage and Azure Blob Storage as is
//! used. They don't check signatures, only that requests carry them.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::sync::atomic::{AtomicBool, Ordering};
use trustformers_store::Environment;

use crate::server::{Received, Reply, TestServer};
use crate::{NamedContent, Wanted, contents, fetch, noise, sha256, store};

const CONFIG: &[u8] = b"{}";

fn objects() -> Vec<NamedContent> {
    vec![
        NamedContent::new("m/", b""),
        NamedContent::new("m/a b/config.json", b"{}"),
        NamedContent::new("m/config.json", CONFIG),
        NamedContent::new("m/model.safetensors", &noise(300_000, 21)),
        NamedContent::new("m2/other.gguf", b"x"),
    ]
}

fn decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8().unwrap().into_owned()
}

fn argument(received: &Received, name: &str) -> Option<String> {
    let query = received.target.split_once('?')?.1;
    query.split('&').find_map(|pair| Some(decoded(pair.strip_prefix(name)?.strip_prefix('=')?)))
}

/// S3 with two objects on each page of a list, and checksums of what was uploaded whole.
fn s3(received: &Received, may_list: bool, damage: bool) -> Reply {
    let signature = received.header("authorization").unwrap_or_default();
    if !signature.starts_with("AWS4-HMAC-SHA256 Credential=key/") || received.header("x-amz-date").is_none() {
        return Reply::new(403, "<Error><Code>AccessDenied</Code></Error>");
    }
    assert!(signature.contains("/eu-central-1/s3/aws4_request"), "{signature}");
    let path = decoded(received.path());
    let Some(key) = path.strip_prefix("/bucket/") else { return Reply::new(404, "") };
    if key.is_empty() {
        if !may_list {
            return Reply::new(403, "<Error><Code>AccessDenied</Code></Error>");
        }
        let prefix = argument(received, "prefix").unwrap();
        let start: usize = argument(received, "continuation-token").map_or(0, |token| token.parse().unwrap());
        let all: Vec<_> = objects().into_iter().filter(|object| object.name.starts_with(&prefix)).collect();
        let entries = all.iter().skip(start).take(2).map(|object| {
            let (key, size, etag) = (&object.name, object.bytes.len(), sha256(&object.bytes));
            format!("<Contents><Key>{key}</Key><Size>{size}</Size><ETag>&quot;{etag}&quot;</ETag></Contents>")
        });
        let next = start + 2;
        let more = if next < all.len() {
            format!("<NextContinuationToken>{next}</NextContinuationToken>")
        } else {
            String::new()
        };
        let entries: String = entries.collect();
        return Reply::new(200, format!("<ListBucketResult>{entries}{more}</ListBucketResult>"));
    }
    let Some(object) = objects().into_iter().find(|object| object.name == key) else {
        return Reply::new(404, "");
    };
    let etag = format!("\"{}\"", sha256(&object.bytes));
    let checksum = BASE64_STANDARD.encode(Sha256::digest(&object.bytes));
    let mut bytes = object.bytes;
    if damage && !bytes.is_empty() {
        bytes[0] ^= 1;
    }
    let reply = Reply::file(received, &bytes).header("etag", etag);
    match received.header("x-amz-checksum-mode") {
        Some("ENABLED") => reply.header("x-amz-checksum-sha256", checksum),
        _ => reply,
    }
}

fn s3_environment(server: &TestServer) -> Environment {
    Environment::from_variables([
        ("AWS_ENDPOINT_URL", server.url()),
        ("AWS_REGION", "eu-central-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "key".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
    ])
}

fn checkpoint() -> Vec<NamedContent> {
    let all = objects().into_iter().filter(|object| object.name.starts_with("m/") && object.name != "m/");
    all.map(|object| NamedContent { name: object.name[2..].to_owned(), bytes: object.bytes }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_s3_is_listed_page_by_page_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|received| s3(received, true, false)).await;
    let store = store(folder.path(), s3_environment(&server));
    let fetched = fetch(&store, Wanted { uri: "s3://bucket/m", ..Wanted::default() }).await.unwrap();
    assert!(contents(&fetched) == checkpoint());
    let one = Wanted { uri: "s3://bucket/m/a b/config.json", ..Wanted::default() };
    assert_eq!(fetch(&store, one).await.unwrap_err().reason(), "UnsupportedSource", "no white space");
    let none = Wanted { uri: "s3://bucket/none", ..Wanted::default() };
    assert_eq!(fetch(&store, none).await.unwrap_err().reason(), "SourceNotFound");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_of_s3_needs_no_right_to_list_and_damage_is_found() {
    let damage = std::sync::Arc::new(AtomicBool::new(true));
    let (folder, damaged) = (tempfile::tempdir().unwrap(), std::sync::Arc::clone(&damage));
    let server = TestServer::start(move |received| s3(received, false, damaged.load(Ordering::SeqCst))).await;
    let wanted = Wanted { uri: "s3://bucket/m2/other.gguf", ..Wanted::default() };
    let right = store(folder.path(), s3_environment(&server));
    assert_eq!(fetch(&right, wanted).await.unwrap_err().reason(), "DigestMismatch");
    damage.store(false, Ordering::SeqCst);
    assert!(contents(&fetch(&right, wanted).await.unwrap()) == [NamedContent::new("other.gguf", b"x")]);
    let unsigned = Environment::from_variables([("AWS_ENDPOINT_URL", server.url())]);
    let error = fetch(&store(folder.path(), unsigned), wanted).await.unwrap_err();
    assert_eq!(error.reason(), "AccessDenied");
    assert!(error.to_string().contains("AWS_ACCESS_KEY_ID"), "{error}");
    assert!(error.to_string().contains("<Code>AccessDenied"), "the list says why, HEAD cannot: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_of_the_service_account_gives_the_keys_of_s3() {
    let (folder, token) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(token.path(), "web-token\n").unwrap();
    let server = TestServer::start(|received| {
        if received.path() == "/sts/" {
            let form = String::from_utf8(received.body.to_vec()).unwrap();
            assert!(
                form.contains("WebIdentityToken=web-token") && form.contains("RoleArn=arn%3Aa"),
                "{form}"
            );
            return Reply::new(
                200,
                "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
                 <AccessKeyId>key</AccessKeyId><SecretAccessKey>s</SecretAccessKey>\
                 <SessionToken>session</SessionToken><Expiration>2999-01-01T00:00:00Z</Expiration>\
                 </Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
            );
        }
        assert_eq!(received.header("x-amz-security-token"), Some("session"));
        s3(received, true, false)
    })
    .await;
    let environment = Environment::from_variables([
        ("AWS_ENDPOINT_URL", server.url()),
        ("AWS_ENDPOINT_URL_STS", format!("{}/sts", server.url())),
        ("AWS_REGION", "eu-central-1".to_owned()),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.path().display().to_string()),
        ("AWS_ROLE_ARN", "arn:a".to_owned()),
    ]);
    let store = store(folder.path(), environment);
    fetch(&store, Wanted { uri: "s3://bucket/m2/other.gguf", ..Wanted::default() }).await.unwrap();
    let logins = server.log().iter().filter(|received| received.path() == "/sts/").count();
    assert_eq!(logins, 1, "keys are kept until they end");
}

#[tokio::test(flavor = "multi_thread")]
async fn google_storage_reads_the_generation_that_it_listed() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|received| {
        if received.path().starts_with("/computeMetadata/v1/instance/service-accounts/default/token") {
            assert_eq!(received.header("metadata-flavor"), Some("Google"));
            return Reply::new(200, r#"{"access_token": "t0ken", "expires_in": 3600}"#);
        }
        if received.header("authorization") != Some("Bearer t0ken") {
            return Reply::new(401, "");
        }
        let Some(name) = received.path().strip_prefix("/storage/v1/b/bucket/o/") else {
            let start: usize = argument(received, "pageToken").map_or(0, |token| token.parse().unwrap());
            let entry = |object: &NamedContent| {
                json!({"name": object.name, "size": object.bytes.len().to_string(), "generation": "7"})
            };
            let items: Vec<_> = objects().iter().skip(start).take(3).map(entry).collect();
            let next = (start + 3 < objects().len()).then(|| (start + 3).to_string());
            return Reply::new(200, json!({"items": items, "nextPageToken": next}).to_string());
        };
        assert_eq!(argument(received, "generation").as_deref(), Some("7"));
        let name = decoded(name);
        match objects().into_iter().find(|object| object.name == name) {
            Some(object) => Reply::file(received, &object.bytes),
            None => Reply::new(404, ""),
        }
    })
    .await;
    let environment = Environment::from_variables([
        ("STORAGE_EMULATOR_HOST", server.url()),
        ("GCE_METADATA_HOST", server.host.clone()),
    ]);
    let store = store(folder.path(), environment);
    let fetched = fetch(&store, Wanted { uri: "gs://bucket/m/", ..Wanted::default() }).await.unwrap();
    assert!(contents(&fetched) == checkpoint());
}

#[tokio::test(flavor = "multi_thread")]
async fn azure_reads_on_condition_that_the_blob_is_the_listed_one() {
    let folder = tempfile::tempdir().unwrap();
    let is_changed = std::sync::Arc::new(AtomicBool::new(true));
    let changed = std::sync::Arc::clone(&is_changed);
    let server = TestServer::start(move |received| {
        let signature = received.header("authorization").unwrap_or_default();
        if !signature.starts_with("SharedKey account:") || received.header("x-ms-date").is_none() {
            return Reply::new(403, "");
        }
        if argument(received, "comp").as_deref() == Some("list") {
            let entries = objects().into_iter().map(|object| {
                let (name, size) = (object.name, object.bytes.len());
                format!(
                    "<Blob><Name>{name}</Name><Properties><Content-Length>{size}</Content-Length><Etag>0x1</Etag></Properties></Blob>"
                )
            });
            let list = format!(
                "\u{feff}<?xml version=\"1.0\"?><EnumerationResults><Blobs>{}</Blobs><NextMarker /></EnumerationResults>",
                entries.collect::<String>()
            );
            return Reply::new(200, list);
        }
        if received.header("if-match") != Some("\"0x1\"") || changed.load(Ordering::SeqCst) {
            return Reply::new(412, "");
        }
        let name = decoded(received.path());
        let name = name.trim_start_matches("/container/");
        let object = objects().into_iter().find(|object| object.name == name).unwrap();
        let mut as_range = received.clone();
        if let Some(range) = received.headers.get("x-ms-range") {
            as_range.headers.insert("range", range.clone());
        }
        Reply::file(&as_range, &object.bytes)
    })
    .await;
    let environment = Environment::from_variables([
        ("AZURE_STORAGE_ENDPOINT", server.url()),
        ("AZURE_STORAGE_ACCOUNT", "account".to_owned()),
        ("AZURE_STORAGE_KEY", BASE64_STANDARD.encode("key")),
    ]);
    let with_account = store(folder.path(), environment);
    let wanted = Wanted { uri: "az://container/m", ..Wanted::default() };
    assert_eq!(fetch(&with_account, wanted).await.unwrap_err().reason(), "SourceChanged");
    is_changed.store(false, Ordering::SeqCst);
    assert!(contents(&fetch(&with_account, wanted).await.unwrap()) == checkpoint());
    let error = fetch(&store(folder.path(), Environment::default()), wanted).await.unwrap_err();
    assert_eq!(error.reason(), "InvalidCredentials", "{error}");
}
