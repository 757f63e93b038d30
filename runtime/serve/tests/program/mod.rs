//! The built program as a test runs it: started in a folder with models, its log read line by line.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use trustformers_model::seeded::{SeededEncoder, SeededModel};

/// A running program; it is killed when a test fails before it has ended.
pub(crate) struct Server {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
    pub(crate) http: String,
    pub(crate) grpc: String,
    pub(crate) folder: TempDir,
}

/// A folder that holds the models `tiny.gguf` and `other.gguf`, and a folder `bert`.
pub(crate) fn folder_of_models() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tiny.gguf"), SeededModel::default().gguf()).unwrap();
    let other = SeededModel { seed: 2, ..SeededModel::default() };
    std::fs::write(folder.path().join("other.gguf"), other.gguf()).unwrap();
    std::fs::create_dir(folder.path().join("bert")).unwrap();
    SeededEncoder::default().write(&folder.path().join("bert")).unwrap();
    folder
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts it on free ports of the loopback with the given models, in a folder with models.
    pub(crate) fn start(models: &str) -> Self {
        let folder = folder_of_models();
        std::fs::write(folder.path().join("config.yaml"), config(models)).unwrap();
        Self::start_in(folder, &[])
    }

    /// Starts it in this folder.
    pub(crate) fn start_in(folder: TempDir, arguments: &[&str]) -> Self {
        let mut program = program(folder.path());
        let mut child =
            program.args(arguments).arg("--log-format=json").stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut server = Self { child, log, http: String::new(), grpc: String::new(), folder };
        let line = server.logged("listening");
        server.http = line["http"].as_str().unwrap().to_owned();
        server.grpc = line["grpc"].as_str().unwrap().to_owned();
        server
    }

    /// The next log line with this message.
    pub(crate) fn logged(&mut self, message: &str) -> Value {
        loop {
            let line = self.next_line(message);
            if line["message"] == message {
                return line;
            }
        }
    }

    pub(crate) fn next_line(&mut self, wanted: &str) -> Value {
        let mut line = String::new();
        assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "the log ended before {wanted:?}");
        serde_json::from_str(&line).unwrap()
    }

    /// Reads on until each of these models was seen in its state, in whatever order they get there.
    pub(crate) fn until_states(&mut self, wanted: &[(&str, &str)]) {
        let mut left = wanted.to_vec();
        while !left.is_empty() {
            let line = self.next_state();
            left.retain(|(model, state)| line["model"] != *model || line["state"] != *state);
        }
    }

    /// The next change of a model's state; a failure's message is its cause.
    fn next_state(&mut self) -> Value {
        loop {
            let line = self.next_line("a state");
            if line["state"].is_string() {
                return line;
            }
        }
    }

    pub(crate) fn get(&self, address: &str, path: &str) -> String {
        http(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> String {
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        );
        http(&self.http, &(head + body))
    }

    /// Sends a signal and gives the exit status.
    pub(crate) fn end_with(&mut self, signal: &str) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        self.child.wait().unwrap().code()
    }
}

/// A `config.yaml` of these models on free ports of the loopback.
pub(crate) fn config(models: &str) -> String {
    format!(
        "batching: {{strategy: size, max_wait_time_ms: 1}}\nserver: {{host: 127.0.0.1, port: 0, grpc_port: 0}}\n\
         monitoring: {{prometheus: {{enabled: true, port: 0}}}}\nmodels: {models}\n"
    )
}

/// The program, to be started in this folder.
pub(crate) fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trustformers-serve"));
    command.current_dir(folder).env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn http(address: &str, request: &str) -> String {
    let mut connection = TcpStream::connect(address).unwrap();
    connection.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    connection.read_to_string(&mut text).unwrap();
    text
}

/// The JSON in an HTTP answer.
pub(crate) fn body(answer: &str) -> Value {
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap()
}
