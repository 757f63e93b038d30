//! `trustformers-serve generate` as users run it: the built program, on a seeded model and on the real one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod models;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use trustformers_model::seeded::SeededModel;

fn generate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trustformers-serve")).arg("generate").args(arguments).output().unwrap()
}

fn seeded(folder: &Path) -> String {
    let file = folder.join("tiny.gguf");
    std::fs::write(&file, SeededModel::default().gguf()).unwrap();
    file.to_str().unwrap().to_owned()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    let text = std::str::from_utf8(&output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "exactly one object: {text}");
    serde_json::from_str(text).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn json_output_is_one_object_and_greedy_answers_repeat() {
    let folder = tempfile::tempdir().unwrap();
    let model = seeded(folder.path());
    let uri = format!("file://{model}");
    let run = |model: &str| {
        let fixed =
            ["--prompt", "Hello", "--max-tokens", "5", "--temperature", "0", "--numerics", "exact", "--json"];
        json(&generate(&[&["--model", model], fixed.as_slice()].concat()))
    };
    let answer = run(&model);
    let keys: Vec<&String> = answer.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["prompt_tokens", "tokens", "text", "finish_reason", "timings_ms"]);
    assert!(!ids(&answer["prompt_tokens"]).is_empty() && !ids(&answer["tokens"]).is_empty());
    assert!(["stop", "length"].contains(&answer["finish_reason"].as_str().unwrap()));
    for time in ["load", "prefill", "first_token", "decode", "total"] {
        assert!(answer["timings_ms"][time].as_f64().unwrap() >= 0.0, "{answer}");
    }
    let again = run(&uri);
    assert_eq!((&answer["tokens"], &answer["text"]), (&again["tokens"], &again["text"]));
}

#[test]
fn a_prompt_file_is_read_exactly_and_stdout_has_only_the_text() {
    let folder = tempfile::tempdir().unwrap();
    let model = seeded(folder.path());
    let file = folder.path().join("prompt.txt");
    let count = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let path = file.to_str().unwrap();
        let arguments =
            ["--model", &model, "--prompt-file", path, "--max-tokens", "1", "--seed", "7", "--json"];
        ids(&json(&generate(&arguments))["prompt_tokens"]).len()
    };
    assert_eq!(count("Hello\n"), count("Hello") + 1, "the final newline is piece of the prompt");

    let arguments = ["--model", &model, "--prompt", "Hello", "--max-tokens", "5", "--temperature", "0"];
    let text = generate(&arguments);
    let same = json(&generate(&[arguments.as_slice(), &["--json"]].concat()));
    let printed = String::from_utf8(text.stdout).unwrap();
    assert_eq!(printed.trim_end_matches('\n'), same["text"].as_str().unwrap().trim_end_matches('\n'));
}

#[test]
fn errors_go_to_stderr_with_their_own_exit_status() {
    let folder = tempfile::tempdir().unwrap();
    let model = seeded(folder.path());
    let bad_prompt = folder.path().join("latin1.txt");
    std::fs::write(&bad_prompt, b"caf\xe9").unwrap();
    let empty_prompt = folder.path().join("empty.txt");
    std::fs::write(&empty_prompt, "").unwrap();
    let bad_model = folder.path().join("bad.gguf");
    std::fs::write(&bad_model, b"no model").unwrap();
    let prompt = ["--prompt", "a"];
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        ([&["--model", "ftp://org/name"], prompt.as_slice()].concat(), 2, "ftp://"),
        ([&["--model", "/no/such.gguf"], prompt.as_slice()].concat(), 1, "/no/such.gguf"),
        ([&["--model", bad_model.to_str().unwrap()], prompt.as_slice()].concat(), 1, "MalformedModel"),
        (vec!["--model", &model, "--prompt-file", bad_prompt.to_str().unwrap()], 2, "byte 3"),
        (vec!["--model", &model, "--prompt-file", "/no/prompt"], 2, "/no/prompt"),
        (vec!["--model", &model, "--prompt", ""], 2, "--prompt: "),
        (vec!["--model", &model, "--prompt-file", empty_prompt.to_str().unwrap()], 2, "--prompt-file: "),
        (vec!["--model", &model, "--prompt", "a", "--max-tokens", "0"], 2, "--max-tokens"),
        (vec!["--model", &model, "--prompt", "a", "--top-p", "2"], 2, "--top-p: "),
        (vec!["--model", &model, "--prompt", "a", "--numerics", "best"], 2, "exact"),
        (vec!["--model", &model, "--prompt", "a", "--min-p", "2"], 2, "--min-p: 2 is not between 0 and 1"),
        (vec!["--model", &model, "--prompt", "a", "--logit-bias", "x"], 2, "42=-5"),
        (
            vec!["--model", &model, "--prompt", "a", "--regex", "("],
            2,
            "response_format: the regular expression",
        ),
        (vec!["--model", &model, "--prompt", "a", "--regex", "a", "--json-object"], 2, "--json-object"),
        (vec!["--model", &model, "--prompt", "a", "--grammar", "/no/grammar"], 2, "--grammar: /no/grammar"),
        (vec!["--model", &model], 2, "--prompt"),
    ];
    for (arguments, code, text) in cases {
        let output = generate(&[arguments.as_slice(), &["--json"]].concat());
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(text), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn formats_stops_and_logprobs_are_honoured() {
    let folder = tempfile::tempdir().unwrap();
    let model = seeded(folder.path());
    let schema = folder.path().join("schema.json");
    std::fs::write(
        &schema,
        r#"{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}"#,
    )
    .unwrap();
    let run = |more: &[&str]| {
        let fixed = ["--model", &model, "--prompt", "Hello", "--max-tokens", "60", "--seed", "3", "--json"];
        json(&generate(&[fixed.as_slice(), more].concat()))
    };
    let answer = run(&["--json-schema", schema.to_str().unwrap(), "--logprobs", "2"]);
    let list: Vec<bool> = serde_json::from_str(answer["text"].as_str().unwrap()).unwrap();
    assert!((2..=3).contains(&list.len()) && answer["finish_reason"] == "stop", "{answer}");
    let logprobs = answer["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), ids(&answer["tokens"]).len());
    assert!(logprobs.iter().all(|one| one["logprob"].as_f64().unwrap() <= 0.0));
    assert!(logprobs.iter().all(|one| one["top"].as_array().unwrap().len() == 2));
    let answer = run(&["--regex", "[a-z]{4}END.*", "--stop", "END"]);
    assert_eq!((answer["text"].as_str().unwrap().len(), &answer["stopped_by"]), (4, &Value::from("END")));
}

#[test]
fn the_real_model_answers_and_recognises_special_tokens() {
    let Some(model) = models::real_model() else { return };
    let model = model.to_str().unwrap();
    let prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";
    let answer = json(&generate(&[
        "--model",
        model,
        "--prompt",
        prompt,
        "--max-tokens",
        "24",
        "--temperature",
        "0",
        "--numerics",
        "exact",
        "--json",
    ]));
    assert!(answer["text"].as_str().unwrap().contains("Paris"), "{answer}");
    assert_eq!(ids(&answer["prompt_tokens"])[0], 1, "<|im_start|> is one token: {answer}");
    if answer["finish_reason"] == "stop" {
        assert_eq!(ids(&answer["tokens"]).last(), Some(&2), "the end token is among the tokens: {answer}");
    }
}
