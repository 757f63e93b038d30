//! The lessons of `examples/course`, each against the real server with real models.
//!
//! The server is the built program with the course's own `config.yaml`, on free ports of the loopback.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

use serde_json::Value;

#[allow(dead_code, reason = "main belongs to the program of the same file")]
#[path = "../../../examples/course/08-grpc.rs"]
mod grpc;
#[allow(dead_code, reason = "main belongs to the program of the same file")]
#[path = "../../../examples/course/09-library.rs"]
mod library;

/// The files that the course's configuration names.
const MODELS: &[&str] = &["SmolLM2-135M-Instruct.Q4_1.gguf", "all-minilm-l6-v2", "seeded-classifier"];

/// Each lesson that is a script, with what its output must hold.
const LESSONS: &[(&str, &[&str])] = &[
    ("01-chat.sh", &["8 legs", "\"finish_reason\""]),
    ("02-openai.py", &["8 legs"]),
    ("03-stream.py", &["red", "tokens, ended by"]),
    ("04-json.sh", &["\"text\":", "\\\"age\\\":"]),
    ("05-embeddings.py", &["nearest: There is a kitten on the rug."]),
    ("06-models.sh", &["\"state\":\"ready\"", "\"model\":\"second\"", "\"state\":\"unloaded\""]),
    (
        "07-operate.sh",
        &["live: {\"status\":\"ok\"", "trustformers_generated_tokens_total{model=\"smollm2\"}"],
    ),
    ("10-classify.sh", &["\"label\":\"greeting\"", "\"score\":"]),
];

fn course() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/course")
}

/// Where the test models are kept, as `make models` puts them.
fn models() -> Option<PathBuf> {
    let folder = std::env::var_os("TRUSTFORMERS_MODELS").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
        Some(cache.join("trustformers/models"))
    })?;
    let Some(missing) = MODELS.iter().find(|model| !folder.join(model).exists()) else { return Some(folder) };
    let required = std::env::var("TRUSTFORMERS_REQUIRE_MODELS").is_ok_and(|value| value == "1");
    let what = format!("{missing} is missing; run `make models MODELS=\"smollm2 minilm classifier\"`");
    assert!(!required, "{what}");
    eprintln!("skipped: {what}");
    None
}

/// The running server; it is killed at the end.
struct CourseServer {
    child: Child,
    /// Kept open, so that the server can write its log.
    log: BufReader<ChildStderr>,
    http: String,
    grpc: String,
}

impl Drop for CourseServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl CourseServer {
    fn start(models: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_trustformers-serve"))
            .current_dir(models)
            .env_remove("RUST_LOG")
            .arg("--config")
            .arg(course().join("config.yaml"))
            .args(["--port", "0", "--grpc-port", "0", "--log-format", "json"])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut server = Self { child, log, http: String::new(), grpc: String::new() };
        let mut loading = vec!["smollm2", "minilm", "labels"];
        while server.http.is_empty() || !loading.is_empty() {
            let mut line = String::new();
            assert_ne!(
                server.log.read_line(&mut line).unwrap(),
                0,
                "the log ended while models were loading"
            );
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == "listening" {
                server.http = format!("http://{}", line["http"].as_str().unwrap());
                server.grpc = format!("http://{}", line["grpc"].as_str().unwrap());
            }
            assert_ne!(line["state"], "failed", "{line}");
            loading.retain(|model| line["model"] != *model || line["state"] != "ready");
        }
        server
    }

    /// The output of a lesson.
    fn run(&self, lesson: &str) -> String {
        let interpreter = if lesson.ends_with(".py") { "python3" } else { "bash" };
        let output = Command::new(interpreter)
            .arg(course().join(lesson))
            .env("TRUSTFORMERS_URL", &self.http)
            .env("NO_PROXY", "*")
            .output()
            .unwrap_or_else(|error| panic!("{interpreter} cannot be started: {error}"));
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{lesson}: {out}\n{err}");
        out.into_owned()
    }
}

/// Whether OpenAI's client is installed; a test over all clients requires it, this one does not.
fn openai_is_installed() -> bool {
    let import = Command::new("python3").args(["-c", "import openai"]).stderr(Stdio::null()).status();
    import.is_ok_and(|status| status.success())
}

#[test]
fn each_lesson_runs_as_it_stands() {
    let Some(models) = models() else { return };
    let server = CourseServer::start(&models);
    for (lesson, expected) in LESSONS {
        if *lesson == "02-openai.py" && !openai_is_installed() {
            eprintln!("skipped: {lesson} needs OpenAI's client for Python");
            continue;
        }
        let output = server.run(lesson);
        for text in *expected {
            assert!(output.contains(text), "{lesson} prints no {text}:\n{output}");
        }
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answer = runtime.block_on(grpc::answer(&server.grpc, "smollm2")).unwrap();
    assert!(answer.contains("red"), "{answer}");
    let model = models.join(MODELS[0]);
    let answer = runtime.block_on(library::serve_and_ask(model.to_str().unwrap())).unwrap();
    assert!(!answer.is_empty());
}

#[test]
fn the_course_lists_each_of_its_files() {
    let page = std::fs::read_to_string(course().join("README.md")).unwrap();
    let mut lessons = 0;
    for entry in std::fs::read_dir(course()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            assert!(page.contains(&format!("({name})")), "{name} is not in the course's README.md");
            let is_run = LESSONS.iter().any(|(lesson, _)| *lesson == name) || name.ends_with(".rs");
            assert!(is_run, "no test runs {name}");
            lessons += 1;
        }
    }
    assert_eq!(lessons, 10);
}
