//! `trustformers-serve bench` as users run it: the built program, a seeded model, servers on the loopback.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use trustformers_model::seeded::{SeededEncoder, SeededModel};
use trustformers_serve::{Config, TrustformersServer};

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trustformers-serve")).arg("bench").args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Answers each request with what `answer` makes of its number, path and body, until the test ends.
fn serve(answer: impl Fn(usize, &str, &Value) -> String + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (answer, number) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let (answer, number) = (answer.clone(), number.clone());
            std::thread::spawn(move || {
                one(connection.unwrap(), |path, body| {
                    answer(number.fetch_add(1, Ordering::Relaxed), path, body)
                });
            });
        }
    });
    url
}

/// One request and its answer; the connection is closed after, which ends a body without a length.
fn one(mut connection: TcpStream, answer: impl Fn(&str, &Value) -> String) {
    let mut reader = BufReader::new(connection.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut length = 0;
    while line.trim() != "" {
        line.clear();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let answer = answer(&path, &serde_json::from_slice(&body).unwrap());
    connection.write_all(answer.as_bytes()).unwrap();
}

fn ok(kind: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n{body}")
}

#[test]
fn llama_streams_are_measured_and_every_failure_has_its_class() {
    let whole = "data: {\"content\":\"a\",\"stop\":false}\n\ndata: {\"content\":\"b\",\"stop\":false}\n\n\
                 data: {\"content\":\"\",\"stop\":true,\"tokens_evaluated\":7,\"tokens_predicted\":2}\n\n";
    let url = serve(move |number, path, body| {
        assert_eq!((path, &body["n_predict"], &body["ignore_eos"]), ("/completion", &4.into(), &true.into()));
        let status = |status| format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        match number {
            1 => status("429 Too Many Requests"),
            2 => status("503 Service Unavailable"),
            3 => status("400 Bad Request"),
            4 => ok("text/event-stream", &whole[..whole.len() / 2]),
            5 => ok("text/html", "data: hello\n"),
            _ => ok("text/event-stream", whole),
        }
    });
    let output = bench(&[
        "load",
        "--url",
        &url,
        "--api",
        "llama",
        "--clients",
        "1",
        "--requests",
        "8",
        "--warm-up",
        "0",
        "--max-tokens",
        "4",
        "--extra",
        "{\"ignore_eos\": true}",
        "--json",
    ]);
    let answer = json(&output);
    assert_eq!((&answer["requests"], &answer["answered"]), (&8.into(), &3.into()), "{answer}");
    let errors = "{\"overloaded\":1,\"refused\":1,\"server_error\":1,\"broken\":1,\"not_understood\":1}";
    assert_eq!(answer["errors"], serde_json::from_str::<Value>(errors).unwrap());
    assert_eq!((&answer["prompt_tokens"], &answer["output_tokens"]), (&21.into(), &6.into()));
    assert!(answer["output_tokens_per_s"].as_f64().unwrap() > 0.0);
    for percentile in ["p50", "p90", "p99", "max"] {
        for time in ["first_token_ms", "per_token_ms", "longest_gap_ms", "total_ms"] {
            assert!(answer[time][percentile].as_f64().unwrap() >= 0.0, "{time} {percentile}: {answer}");
        }
    }
}

#[test]
fn embeddings_come_in_an_open_loop_and_texts_are_counted() {
    let url = serve(|_, path, body| {
        assert_eq!((path, body["input"].as_array().map(Vec::len)), ("/v1/embeddings", Some(3)));
        ok("application/json", "{\"data\":[{\"embedding\":[1]},{\"embedding\":[1]},{\"embedding\":[1]}]}")
    });
    let output = bench(&[
        "load",
        "--url",
        &url,
        "--api",
        "embeddings",
        "--batch",
        "3",
        "--rate",
        "200",
        "--arrivals",
        "constant",
        "--requests",
        "20",
        "--prompt-words",
        "5",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("20 of 20 requests answered") && text.contains("texts/s"), "{text}");
    assert!(text.contains("whole answer") && !text.contains("first token"), "{text}");
}

#[test]
fn this_server_answers_its_own_client() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    std::fs::write(&file, SeededModel::default().gguf()).unwrap();
    let text = format!(
        "server: {{host: 127.0.0.1, port: 0, grpc_port: 0}}\nmodels: [{{name: tiny, path: {}}}]",
        file.display()
    );
    let config: Config = text.parse().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(async {
        let server = TrustformersServer::new(config).with_threads(1).start().await.unwrap();
        server.until_ready().await;
        server
    });
    let url = format!("http://{}", server.http_address());
    let output = bench(&[
        "load",
        "--url",
        &url,
        "--clients",
        "3",
        "--requests",
        "9",
        "--prompt-words",
        "8",
        "--max-tokens",
        "5",
        "--json",
    ]);
    let answer = json(&output);
    assert_eq!((&answer["answered"], &answer["errors"]), (&9.into(), &Value::Object(Default::default())));
    let tokens = answer["output_tokens"].as_u64().unwrap();
    assert!((9..=45).contains(&tokens) && answer["prompt_tokens"].as_u64().unwrap() >= 9 * 8, "{answer}");
    runtime.block_on(server.drain());
}

#[test]
fn an_engine_is_measured_with_every_answer_at_full_length() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    std::fs::write(&file, SeededModel::default().gguf()).unwrap();
    let output = bench(&[
        "engine",
        "--model",
        file.to_str().unwrap(),
        "--prefill",
        "40",
        "--depth",
        "0,32",
        "--sequences",
        "3",
        "--prompt-tokens",
        "8",
        "--tokens",
        "12",
        "--repeat",
        "3",
        "--threads",
        "1",
        "--json",
    ]);
    let answer = json(&output);
    assert!(answer["device"].as_str().unwrap().starts_with("cpu"), "{answer}");
    let results = answer["results"].as_array().unwrap();
    let what: Vec<_> = (results.iter())
        .map(|one| {
            (
                one["what"].as_str().unwrap(),
                one["prompt_tokens"].as_u64().unwrap(),
                one["sequences"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(what, [("prefill", 40, 1), ("decode", 1, 1), ("decode", 32, 1), ("decode", 8, 3)]);
    for one in results {
        // A turn in which three short answers never ran together has no figure.
        let least = if one["sequences"] == 3 { 0 } else { 3 };
        let values = one["values"].as_array().unwrap().len();
        assert!((least..=3).contains(&values), "{one}");
        if values == 0 {
            continue;
        }
        let at = |name: &str| one[name].as_f64().unwrap();
        assert!(0.0 < at("min") && at("min") <= at("median") && at("median") <= at("max"), "{one}");
    }
}

#[test]
fn a_model_that_embeds_is_measured_in_texts() {
    let folder = tempfile::tempdir().unwrap();
    SeededEncoder::default().write(folder.path()).unwrap();
    let model = folder.path().to_str().unwrap();
    let fixed = ["engine", "--model", model, "--repeat", "1", "--threads", "1"];
    let run = |more: &[&str]| bench(&[fixed.as_slice(), more].concat());
    let answer = json(&run(&["--texts", "1,3", "--text-tokens", "8", "--json"]));
    for (one, texts) in answer["results"].as_array().unwrap().iter().zip([1, 3]) {
        assert_eq!((&one["what"], &one["texts"]), (&"embed".into(), &texts.into()), "{answer}");
        assert!(one["unit"] == "texts/s" && one["median"].as_f64().unwrap() > 0.0, "{one}");
    }
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--texts 1,32"), "{}", stderr(&output));
    let file = folder.path().join("tiny.gguf");
    std::fs::write(&file, SeededModel::default().gguf()).unwrap();
    let output = bench(&["engine", "--model", file.to_str().unwrap(), "--texts", "1"]);
    assert!(stderr(&output).contains("--texts: the model generates text"), "{}", stderr(&output));
}

#[test]
fn errors_have_their_own_exit_status() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed_port = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let load = |more: &[&'static str]| [&["load"], more].concat();
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        (load(&["--url", "https://localhost"]), 2, "--url"),
        (load(&["--rate", "0"]), 2, "--rate: 0"),
        (load(&["--clients", "1001"]), 2, "--clients: 1001"),
        (load(&["--requests", "0"]), 2, "--requests: 0"),
        (load(&["--duration-s", "4000"]), 2, "--duration-s: 4000"),
        (load(&["--extra", "[]"]), 2, "--extra: is no JSON object"),
        (load(&["--batch", "2"]), 2, "--batch"),
        (load(&["--clients", "1", "--rate", "1"]), 2, "--rate"),
        (vec!["load", "--url", &closed_port, "--clients", "1", "--requests", "2"], 1, "connection 2"),
        (vec!["engine", "--model", "/no/such.gguf"], 1, "/no/such.gguf"),
        (vec!["engine", "--model", "/m", "--tokens", "1"], 2, "--tokens: 1"),
        (vec!["engine", "--model", "/m", "--numerics", "best"], 2, "exact"),
    ];
    for (arguments, code, text) in cases {
        let output = bench(&arguments);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(text), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty());
    }
}
