//! `trustformers-serve classify` and `rerank` as users run them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;
use trustformers_model::seeded::{SeededCheckpoint, SeededEncoder, SeededReader, SeededReading};

fn folder(checkpoint: &SeededCheckpoint) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    checkpoint.write(folder.path()).unwrap();
    folder
}

fn run(command: &str, model: &Path, arguments: &[&str]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_trustformers-serve"));
    program.env_remove("RUST_LOG").arg(command).arg("--model").arg(model).args(arguments).output().unwrap()
}

fn json_of(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::str::from_utf8(&output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "exactly one object");
    serde_json::from_str(text).unwrap()
}

#[test]
fn every_line_of_a_file_gets_the_scores_of_its_text_alone() {
    let model = folder(&SeededCheckpoint::default());
    let file = model.path().join("texts");
    std::fs::write(&file, "hello world\n\nthe cat\n").unwrap();
    let exact = ["--numerics", "exact", "--json"];
    let all =
        run("classify", model.path(), &[&["--input-file", file.to_str().unwrap()][..], &exact].concat());
    let all = json_of(&all);
    let results = all["results"].as_array().unwrap();
    assert_eq!((results.len(), &all["usage"]["prompt_tokens"]), (3, &json!(4 + 2 + 4)));
    for (text, wanted) in ["hello world", "", "the cat"].into_iter().zip(results) {
        let scores = wanted["scores"].as_array().unwrap();
        let [best, other] = &scores[..] else { panic!("{scores:?}") };
        assert!(best["score"].as_f64() >= other["score"].as_f64(), "{scores:?}");
        let mut labels = [best["label"].as_str().unwrap(), other["label"].as_str().unwrap()];
        labels.sort_unstable();
        assert_eq!(labels, ["HAM", "SPAM"]);
        let alone = run("classify", model.path(), &[&["--input", text][..], &exact].concat());
        assert_eq!(json_of(&alone)["results"], json!([wanted]), "{text:?}");
    }
    let lines = run("classify", model.path(), &["--input", "hello", "--input", "", "--top-k", "1"]);
    let lines = String::from_utf8(lines.stdout).unwrap();
    assert_eq!(lines.lines().count(), 2);
    assert!(lines.lines().all(|line| line.starts_with("HAM ") || line.starts_with("SPAM ")), "{lines}");
}

#[test]
fn a_model_that_labels_tokens_prints_entities() {
    let keys = json!({"architectures": ["BertForTokenClassification"], "id2label": {"0": "A", "1": "B"}});
    let model = folder(&SeededCheckpoint { keys, ..SeededCheckpoint::default() });
    let asked = ["--input", "the cat", "--input", ""];
    let found = json_of(&run("classify", model.path(), &[&asked[..], &["--json"]].concat()));
    let results = found["results"].as_array().unwrap();
    assert_eq!((results.len(), &results[1]), (2, &json!({"entities": []})));
    let places: Vec<Value> =
        results[0]["entities"].as_array().unwrap().iter().map(|one| one["start"].clone()).collect();
    assert_eq!(places, [json!(0), json!(4)]);
    assert!(results[0]["entities"][0]["entity"].is_string(), "{found}");
    let lines = run("classify", model.path(), &[&asked[..], &["--aggregation-strategy", "simple"]].concat());
    let lines = String::from_utf8(lines.stdout).unwrap();
    assert!(lines.lines().all(|line| line.starts_with("0\tA\t") || line.starts_with("0\tB\t")), "{lines}");
    assert!(lines.contains("\t0..") && lines.trim_end().ends_with("cat"), "{lines}");
    let message = |arguments: &[&str]| {
        let output = run("classify", model.path(), arguments);
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let wrong = message(&["--input", "a", "--top-k", "1"]);
    assert!(wrong.contains("--top-k: it is for labels of whole texts"), "{wrong}");
    let wrong = message(&["--input", "a", "--aggregation-strategy", "mean"]);
    assert!(wrong.contains("none, simple, first, average or max"), "{wrong}");
}

#[test]
fn documents_come_best_first() {
    let model = folder(&SeededCheckpoint::reranker());
    let documents = ["--document", "hello world", "--document", "the cat", "--document", ""];
    let asked = [&["--query", "the cat", "--json"][..], &documents].concat();
    let all = json_of(&run("rerank", model.path(), &asked));
    let results = all["results"].as_array().unwrap();
    let scores: Vec<f64> = results.iter().map(|one| one["score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|one, other| one >= other), "{scores:?}");
    let mut places: Vec<u64> = results.iter().map(|one| one["index"].as_u64().unwrap()).collect();
    places.sort_unstable();
    assert_eq!(places, [0, 1, 2]);
    let best = json_of(&run("rerank", model.path(), &[&asked[..], &["--top-n", "1"]].concat()));
    assert_eq!(best["results"], json!([results[0]]));
    let raw = json_of(&run("rerank", model.path(), &[&asked[..], &["--raw-scores"]].concat()));
    assert_eq!(raw["results"][0]["index"], results[0]["index"]);
}

#[test]
fn the_command_decides_the_task_where_the_files_leave_it_open() {
    let reader = |reading| {
        let folder = tempfile::tempdir().unwrap();
        SeededReader::new(reading).write(folder.path()).unwrap();
        folder
    };
    // The files of a decoder that ranks by its words are those of one that generates.
    let either = reader(SeededReading::Words);
    let asked = ["--query", "the cat", "--document", "hello world", "--document", "the cat", "--json"];
    let ranked = json_of(&run("rerank", either.path(), &asked));
    let scores: Vec<f64> =
        ranked["results"].as_array().unwrap().iter().map(|one| one["score"].as_f64().unwrap()).collect();
    assert!(scores.len() == 2 && scores.iter().all(|score| (0.0..=1.0).contains(score)), "{ranked}");
    let message = |command: &str, model: &Path, arguments: &[&str]| {
        let output = run(command, model, arguments);
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let wrong = message("classify", either.path(), &["--input", "a"]);
    assert!(wrong.contains("its task is generate, not classify; use trustformers-serve generate"), "{wrong}");
    let embedder = reader(SeededReading::Embed);
    let wrong = message("rerank", embedder.path(), &asked);
    assert!(wrong.contains("its task is embed, not rerank; use trustformers-serve embed"), "{wrong}");
}

#[test]
fn the_wrong_kind_of_model_or_flag_is_named_with_its_fix() {
    let classifier = folder(&SeededCheckpoint::default());
    let embedder = tempfile::tempdir().unwrap();
    SeededEncoder::default().write(embedder.path()).unwrap();
    let message = |command: &str, model: &Path, arguments: &[&str]| {
        let output = run(command, model, arguments);
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let wrong = message("classify", embedder.path(), &["--input", "a"]);
    assert!(wrong.contains("its task is embed, not classify; use trustformers-serve embed"), "{wrong}");
    let wrong = message("rerank", classifier.path(), &["--query", "a", "--document", "b"]);
    assert!(wrong.contains("its task is classify, not rerank"), "{wrong}");
    let wrong = message("embed", classifier.path(), &["--input", "a"]);
    assert!(wrong.contains("use trustformers-serve classify"), "{wrong}");
    let zero = message("classify", classifier.path(), &["--input", "a", "--top-k", "0"]);
    assert!(zero.contains("--top-k: 0 asks for nothing"), "{zero}");
    let empty = message("rerank", classifier.path(), &["--query", "", "--document", "b"]);
    assert!(empty.contains("--query: it is empty"), "{empty}");
    let strict = ["--input", &"cat ".repeat(500), "--no-truncate"];
    let long = message("classify", classifier.path(), &strict);
    assert!(long.contains("text 0 has more than the 64 tokens"), "{long}");
}
