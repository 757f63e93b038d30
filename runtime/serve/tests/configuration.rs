//! Where the program takes its configuration from: an `InferenceModel`, a folder of models, a file that
//! changes while it runs; and what it prints of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod program;

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use program::{Server, body, config, folder_of_models, program};

const ON_FREE_PORTS: &[&str] = &["--host", "127.0.0.1", "--port", "0", "--grpc-port", "0"];

/// Exit status, stdout and stderr of the program.
fn run(folder: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut program = program(folder);
    let output = program.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn manifest(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

/// Names of the models that are listed.
fn listed(server: &Server) -> Vec<String> {
    let list = body(&server.get(&server.http, "/v1/models"));
    let list = list["data"].as_array().unwrap().iter();
    list.map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn inference_models_are_served_as_they_stand() {
    let folder = folder_of_models();
    let text = format!(
        "{}---\n{}---\nserver: {{host: 127.0.0.1, port: 0, grpc_port: 0}}\n",
        manifest("chat", "{source: {uri: tiny.gguf}, runtime: {contextTokens: 64}}"),
        manifest("search", "{source: {uri: 'oci://x/bert:1'}, task: embed}"),
    );
    std::fs::write(folder.path().join("model.yaml"), text).unwrap();
    let mut server = Server::start_in(folder, &["run", "model.yaml", "--source", "search=bert"]);
    server.until_states(&[("chat", "ready"), ("search", "ready")]);
    let answer = body(&server.post("/v1/generate", r#"{"prompt":"Hello","max_tokens":2}"#));
    assert_eq!(answer["model"], "chat");
    assert_eq!(body(&server.post("/v1/embeddings", r#"{"input":"hello"}"#))["model"], "search");
    let list = body(&server.get(&server.http, "/v1/models"));
    assert_eq!(list["data"][0]["context_tokens"], 64);
    assert_eq!(server.end_with("-TERM"), Some(0));
}

#[test]
fn what_one_process_cannot_honour_is_refused_by_name_before_anything_is_served() {
    let folder = folder_of_models();
    let file = folder.path().join("model.yaml");
    for (spec, says) in [
        (
            "{source: {uri: tiny.gguf}, scaling: {replicas: 2}}",
            "InferenceModel chat: spec.scaling.replicas: ",
        ),
        ("{source: {uri: 'pvc://x/y'}}", "--source chat=PATH"),
        (
            "{source: {uri: tiny.gguf}, runtme: {}}",
            "spec.runtme: there is no such key; did you mean \"runtime\"?",
        ),
    ] {
        std::fs::write(&file, manifest("chat", spec)).unwrap();
        let (code, _, message) = run(folder.path(), &["run", "model.yaml"]);
        assert!(code == Some(1) && message.contains("model.yaml") && message.contains(says), "{message}");
    }
}

#[test]
fn the_printed_configuration_means_the_same_and_is_printed_again() {
    let folder = folder_of_models();
    let text = format!(
        "{}---\nmodels: [{{name: tiny, path: tiny.gguf, aliases: [small]}}]\n",
        manifest(
            "chat",
            "{source: {uri: 'file:///m'}, runtime: {numerics: exact}, traffic: {drainTimeout: 5s}}"
        )
    );
    std::fs::write(folder.path().join("model.yaml"), text).unwrap();
    let (code, first, message) =
        run(folder.path(), &["run", "model.yaml", "--print-config", "--port", "7", "--host", "::1"]);
    assert_eq!(code, Some(0), "{message}");
    for line in ["::1", "port: 7", "grpc_port: 9090", "name: chat", "numerics: exact", "max_queue: 512"] {
        assert!(first.contains(line), "{line} is not in {first}");
    }
    std::fs::write(folder.path().join("config.yaml"), &first).unwrap();
    let (code, second, message) = run(folder.path(), &["--print-config"]);
    assert_eq!((code, second), (Some(0), first), "{message}");
}

#[test]
fn a_folder_of_models_is_served_where_there_is_no_configuration() {
    let folder = folder_of_models();
    let arguments = [&["--models", "."], ON_FREE_PORTS].concat();
    let mut server = Server::start_in(folder, &arguments);
    server.until_states(&[("tiny", "ready"), ("other", "ready"), ("bert", "ready")]);
    assert_eq!(listed(&server), ["bert", "other", "tiny"]);
    std::fs::rename(server.folder.path().join("other.gguf"), server.folder.path().join("new.gguf")).unwrap();
    server.until_states(&[("new", "ready")]);
    assert_eq!(listed(&server), ["bert", "tiny", "new"]);
    assert_eq!(server.end_with("-TERM"), Some(0));

    let empty = tempfile::tempdir().unwrap();
    let (code, _, message) = run(empty.path(), &["--models", "."]);
    assert!(code == Some(1) && message.contains("holds no model: put a .gguf file there"), "{message}");
    std::fs::write(empty.path().join("config.yaml"), "models: []").unwrap();
    let (code, _, message) = run(empty.path(), &["--models", "."]);
    assert!(code == Some(1) && message.contains("config.yaml"), "a configuration comes first: {message}");
}

#[test]
fn a_file_that_changes_is_applied_and_a_broken_one_is_not() {
    let mut server = Server::start("[{name: a, path: tiny.gguf}]");
    server.until_states(&[("a", "ready")]);
    let write = |server: &Server, text: String| {
        std::fs::write(server.folder.path().join("config.yaml"), text).unwrap();
    };
    let digest = |server: &Server| body(&server.get(&server.http, "/v1/models"))["data"][0]["digest"].clone();
    let before = digest(&server);
    write(&server, config("[{name: a, path: other.gguf}, {name: b, path: tiny.gguf}]"));
    server.logged("the changed configuration is applied");
    assert_ne!(digest(&server), before, "the model was replaced");
    assert_eq!(listed(&server), ["a", "b"]);
    write(&server, "models: [{name: a, pth: tiny.gguf}]".to_owned());
    let refusal = loop {
        let line = server.next_line("a refusal");
        if line["level"] == "ERROR" {
            break line;
        }
    };
    let message = refusal["message"].as_str().unwrap();
    assert!(message.contains("everything stays as it is") && message.contains("models[0].pth"), "{refusal}");
    assert_eq!(listed(&server), ["a", "b"]);
    let asked = body(&server.post("/v1/generate", r#"{"prompt":"Hello","max_tokens":2,"model":"a"}"#));
    assert_eq!(asked["model"], Value::from("a"));
    assert_eq!(server.end_with("-INT"), Some(0));
}
