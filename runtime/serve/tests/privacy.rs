//! Logs are JSON lines, and no line ever holds a text of a request: not at debug, not of a request that is
//! refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod program;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use trustformers_api::surfaces::{Endpoint, HttpMethod, SURFACES};
use trustformers_serve::proto::{
    EmbedRequest, GenerateRequest, inference_service_client::InferenceServiceClient,
};

/// In every text that is sent, and in no other place.
const MARKER: &str = "zebra-crossing";

/// A running program whose log is read to its end on a thread of its own.
struct Logged {
    child: Child,
    /// The lines of the start: where it listens, and the states of its models.
    start: Receiver<Value>,
    /// Gives every line once the log has ended.
    reader: Option<JoinHandle<Vec<String>>>,
}

impl Drop for Logged {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Logged {
    fn start(folder: &std::path::Path) -> Self {
        let mut program = program::program(folder);
        let mut child =
            program.args(["--log-format=json", "--log=debug"]).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        // A line for the listeners and some ten states of two models.
        let (sender, start) = sync_channel(64);
        let reader = std::thread::spawn(move || {
            let mut lines = Vec::new();
            for line in log.lines().map(Result::unwrap) {
                let json: Value = serde_json::from_str(&line).unwrap_or_default();
                if json["message"] == "listening" || json["state"].is_string() {
                    let _ended = sender.try_send(json);
                }
                lines.push(line);
            }
            lines
        });
        Self { child, start, reader: Some(reader) }
    }

    /// The next line of the start that is so.
    fn until(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        self.start.iter().find(|line| wanted(line)).unwrap()
    }

    /// Ends it, and gives every line of its log.
    fn end(&mut self) -> Vec<String> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.child.wait().unwrap();
        self.reader.take().unwrap().join().unwrap()
    }
}

/// Bodies that are right for one surface or another, and bodies that are wrong in all ways.
fn bodies() -> Vec<String> {
    let message = json!([{"role": "user", "content": MARKER}]);
    let right = [
        json!({"model": "tiny", "prompt": MARKER, "max_tokens": 2}),
        json!({"model": "tiny", "messages": message, "max_tokens": 2}),
        json!({"model": "tiny", "input": MARKER, "max_output_tokens": 16}),
        json!({"model": "bert", "input": [MARKER, MARKER]}),
        json!({"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [MARKER]}]}),
    ];
    let wrong = [
        json!({"model": "tiny", "prompt": MARKER, "max_tokens": MARKER}),
        json!({"model": "tiny", "prompt": {MARKER: 1}, MARKER: MARKER}),
        json!({"model": "tiny", "messages": MARKER, "input": {MARKER: [MARKER]}, "max_tokens": 2}),
        json!({"model": "tiny", "messages": [{"role": MARKER, "content": MARKER}], "max_tokens": 2}),
        json!({"model": "tiny", "prompt": MARKER.repeat(4000), "input": MARKER.repeat(4000), "max_tokens": 2}),
        json!({"model": "tiny", "prompt": MARKER, "stop": [MARKER], "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": MARKER}}}}),
        json!([MARKER]),
        json!(MARKER),
    ];
    let mut bodies: Vec<String> = right.iter().chain(&wrong).map(ToString::to_string).collect();
    bodies.push(format!("{{\"model\": \"tiny\", \"prompt\": \"{MARKER}"));
    bodies.push(MARKER.to_owned());
    bodies
}

fn send(address: &str, request: &[u8]) -> String {
    let mut connection = TcpStream::connect(address).unwrap();
    connection.write_all(request).unwrap();
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn post(address: &str, path: &str, body: &str) -> String {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         anthropic-version: 2023-06-01\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    send(address, (head + body).as_bytes())
}

/// A text frame of a WebSocket's client, with a mask of zeros, and a close frame.
fn frames(text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).unwrap().to_be_bytes();
    let mut bytes = vec![0x81, 0x80 | 126, length[0], length[1], 0, 0, 0, 0];
    bytes.extend(text.as_bytes());
    bytes.extend([0x88, 0x80, 0, 0, 0, 0]);
    bytes
}

#[test]
fn no_line_of_the_log_holds_a_text_of_a_request() {
    let folder = program::folder_of_models();
    let config = program::config("[{name: tiny, path: tiny.gguf}, {name: bert, path: bert}]");
    std::fs::write(folder.path().join("config.yaml"), config).unwrap();
    let mut server = Logged::start(folder.path());
    let listening = server.until(|line| line["message"] == "listening");
    let http = listening["http"].as_str().unwrap().to_owned();
    let grpc = listening["grpc"].as_str().unwrap().to_owned();
    for _ in 0..2 {
        server.until(|line| line["state"] == "ready");
    }
    let mut answered = 0;
    for surface in SURFACES {
        let Endpoint::Http { method: HttpMethod::Post, path } = surface.endpoint else { continue };
        if path.starts_with("/v1/models/") {
            continue;
        }
        let path = path.replace("{model}", "tiny").replace("{version}", "1");
        for body in bodies() {
            let answer = post(&http, &path, &body);
            assert!(answer.starts_with("HTTP/1.1 "), "{path} {body}: {answer}");
            answered += usize::from(answer.starts_with("HTTP/1.1 200"));
        }
    }
    // The models have no chat template, so that conversations are among what is refused.
    assert!(answered >= 6, "only {answered} bodies were right for a surface");
    for body in bodies() {
        let handshake = "GET /v1/stream HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        let body: String = body.chars().take(60_000).collect();
        let answer = send(&http, &[handshake.as_bytes(), &frames(&body)].concat());
        assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = InferenceServiceClient::connect(format!("http://{grpc}")).await.unwrap();
        let right = GenerateRequest {
            model: "tiny".into(),
            prompt: MARKER.into(),
            max_tokens: 2,
            ..Default::default()
        };
        let wrong = GenerateRequest { top_p: 7.0, ..right.clone() };
        client.generate(right).await.unwrap();
        client.generate(wrong).await.unwrap_err();
        let input = vec![MARKER.to_owned(), MARKER.repeat(4000)];
        client.embed(EmbedRequest { model: "bert".into(), input, ..Default::default() }).await.unwrap();
    });
    let lines = server.end();
    for line in &lines {
        let _: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(!line.contains(MARKER), "{line}");
    }
    let lines = lines.len();
    assert!(lines > 50, "at debug there is a line for each refused request, and there are {lines}");
}
