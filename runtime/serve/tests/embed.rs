//! `trustformers-serve embed` as users run it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use trustformers_model::seeded::{SeededEncoder, SeededModel};

fn checkpoint(encoder: &SeededEncoder) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    encoder.write(folder.path()).unwrap();
    folder
}

fn embed(model: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trustformers-serve"));
    command.env_remove("RUST_LOG").arg("embed").arg("--model").arg(model).args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::str::from_utf8(&output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "exactly one object");
    serde_json::from_str(text).unwrap()
}

fn vectors(output: &Value) -> Vec<Vec<f64>> {
    let vector = |one: &Value| serde_json::from_value(one["embedding"].clone()).unwrap();
    output["data"].as_array().unwrap().iter().map(vector).collect()
}

#[test]
fn every_line_of_a_file_gets_the_vector_of_its_text_alone() {
    let model = checkpoint(&SeededEncoder::default());
    let file = model.path().join("texts");
    std::fs::write(&file, "hello world\n\nthe cat\nhello world\n").unwrap();
    let exact = ["--numerics", "exact", "--json", "--threads", "2"];
    let of_file = embed(model.path(), &[&["--input-file", file.to_str().unwrap()][..], &exact].concat());
    let of_file = json(&of_file);
    let all = vectors(&of_file);
    assert_eq!((all.len(), all[0].len()), (4, 64));
    assert_eq!(all[0], all[3]);
    assert_eq!(of_file["usage"]["prompt_tokens"], 4 + 2 + 4 + 4);
    assert!(of_file.get("pooling_note").is_none() && of_file.get("truncated").is_none());
    for (text, wanted) in ["hello world", "", "the cat"].into_iter().zip(&all) {
        let alone = json(&embed(model.path(), &[&["--input", text][..], &exact].concat()));
        assert_eq!(&vectors(&alone)[0], wanted, "{text:?}");
    }
}

#[test]
fn without_json_there_is_a_line_for_each_text() {
    let model = checkpoint(&SeededEncoder::default());
    let output = embed(model.path(), &["--input", "hello", "--input", ""]);
    let lines: Vec<Vec<f32>> = output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect();
    assert_eq!(lines.iter().map(Vec::len).collect::<Vec<_>>(), [64, 64]);
}

#[test]
fn missing_pooling_and_cut_texts_are_reported() {
    let model = checkpoint(&SeededEncoder { pooling: None, normalised: false, ..SeededEncoder::default() });
    let long = "cat ".repeat(500);
    let answer = json(&embed(model.path(), &["--input", "hello", "--input", &long, "--json"]));
    assert!(answer["pooling_note"].as_str().unwrap().contains("mean"), "{answer}");
    assert_eq!(answer["truncated"], serde_json::json!([1]));
    let refused = embed(model.path(), &["--input", "hello", "--input", &long, "--no-truncate"]);
    let message = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(message.contains("text 1 has more than the 64 tokens"), "{message}");
}

#[test]
fn the_wrong_kind_of_model_or_file_is_named_with_its_fix() {
    let model = checkpoint(&SeededEncoder::default());
    let generates = model.path().join("m.gguf");
    std::fs::write(&generates, SeededModel::default().gguf()).unwrap();
    let empty = model.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let run = |path: &Path, arguments: &[&str]| {
        let output = embed(path, arguments);
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, message) = run(&generates, &["--input", "a"]);
    assert!(code == Some(2) && message.contains("trustformers-serve generate"), "{message}");
    std::fs::remove_file(&generates).unwrap();
    let (code, message) = run(model.path(), &["--input-file", empty.to_str().unwrap()]);
    assert!(code == Some(2) && message.contains("--input-file: it is empty"), "{message}");
    let (code, message) = run(model.path(), &["--input-file", "/nowhere"]);
    assert!(code == Some(2) && message.contains("/nowhere cannot be read"), "{message}");
    assert_eq!(message.matches("os error").count(), 1, "said twice: {message}");
    let (code, message) = run(model.path(), &[]);
    assert!(code == Some(2) && message.contains("--input"), "{message}");
    let generate = Command::new(env!("CARGO_BIN_EXE_trustformers-serve"))
        .args(["generate", "--prompt", "a", "--model"])
        .arg(model.path())
        .output()
        .unwrap();
    let message = String::from_utf8(generate.stderr).unwrap();
    assert!(generate.status.code() == Some(2) && message.contains("trustformers-serve embed"), "{message}");
}
