//! One process as a gateway: models that other servers have, beside those that it loads itself.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod program;

use program::{Server, body, config, folder_of_models};

const TINY: &str = "[{name: tiny, path: tiny.gguf}]";
const REQUEST: &str = r#"{"model":"tiny","prompt":"Hello","max_tokens":2,"temperature":0}"#;

/// Servers that have the model.
fn pods() -> [Server; 2] {
    let mut pods = [Server::start(TINY), Server::start(TINY)];
    for pod in &mut pods {
        pod.until_states(&[("tiny", "ready")]);
    }
    pods
}

/// A server in front of these, with further models and sections.
fn in_front_of(pods: &[Server], models: &str, sections: &str) -> Server {
    let folder = folder_of_models();
    let endpoints: Vec<String> = pods.iter().map(|pod| format!("{{url: 'http://{}'}}", pod.http)).collect();
    let remote = format!("{{name: tiny, task: generate, endpoints: [{}]}}", endpoints.join(", "));
    let text = format!("{}{sections}", config(&format!("[{remote}{models}]")));
    std::fs::write(folder.path().join("config.yaml"), text).unwrap();
    let mut front = Server::start_in(folder, &[]);
    // The first address is that of the models that are loaded here, behind the gateway.
    let line = front.logged("listening");
    front.http = line["http"].as_str().unwrap().to_owned();
    front.grpc = line["grpc"].as_str().unwrap().to_owned();
    front
}

/// The sum of the series whose line begins like this.
fn metric(server: &Server, begin: &str) -> f64 {
    let text = server.get(&server.http, "/metrics");
    let values = text.lines().filter(|line| line.starts_with(begin));
    values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[test]
fn a_killed_endpoint_loses_no_request_that_a_retry_saves() {
    let mut pods = pods();
    let sections = "load_balancing: {algorithm: least_connections, health_check_interval_sec: 1}\n\
                    high_availability: {retry_max_attempts: 3, retry_backoff_ms: [20, 40, 80]}\n";
    let mut front = in_front_of(&pods, "", sections);
    let expected = body(&pods[0].post("/v1/generate", REQUEST))["text"].clone();
    for _ in 0..20 {
        assert_eq!(body(&front.post("/v1/generate", REQUEST))["text"], expected);
    }
    let asked = |pod: &Server| metric(pod, "trustformers_requests_total");
    assert!(pods.iter().all(|pod| asked(pod) > 0.0), "both servers got requests");
    pods[0].end_with("-KILL");
    // A request whose connection broke may have ended its server: it alone is not sent to another one.
    let answers = (0..40).map(|_| front.post("/v1/generate", REQUEST));
    let failed: Vec<String> = answers.filter(|answer| !answer.starts_with("HTTP/1.1 200")).collect();
    assert!(failed.len() <= 1, "{failed:?}");
    assert!(metric(&front, "trustformers_gateway_retries_total{reason=\"connect\"") >= 1.0);
    // Without any server the answer says so at once.
    pods[1].end_with("-KILL");
    for _ in 0..5 {
        let lost = front.post("/v1/generate", REQUEST);
        assert!(lost.starts_with("HTTP/1.1 50"), "{lost}");
    }
    assert_eq!(front.end_with("-TERM"), Some(0));
}

#[test]
fn models_of_this_process_and_of_others_have_one_address() {
    let pods = pods();
    let mut front = in_front_of(&pods, ", {name: near, path: other.gguf}", "");
    let near = r#"{"model":"near","prompt":"Hello","max_tokens":2}"#;
    // The routes follow the state of the model.
    let served = (0..10_000).any(|_| front.post("/v1/generate", near).starts_with("HTTP/1.1 200"));
    assert!(served, "the model that is loaded here is not routed to");
    assert_eq!(body(&front.post("/v1/generate", REQUEST))["model"], "tiny");
    let list = body(&front.get(&front.http, "/v1/models"));
    let names: Vec<_> = list["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect();
    assert_eq!(names, ["tiny", "near"]);
    assert_eq!(list["data"][0]["ready_endpoints"], 2);
    let refused = front.post("/v1/models/load", r#"{"name": "a", "path": "tiny.gguf"}"#);
    assert!(refused.starts_with("HTTP/1.1 403") && refused.contains("configuration"), "{refused}");
    assert!(metric(&front, "trustformers_gateway_attempts_total") >= 2.0);
    assert_eq!(front.end_with("-TERM"), Some(0));
}

#[test]
fn endpoints_change_while_it_runs() {
    let pods = pods();
    let mut front = in_front_of(&pods[..1], "", "");
    assert_eq!(body(&front.get(&front.http, "/v1/models"))["data"][0]["ready_endpoints"], 1);
    let text = config(&format!(
        "[{{name: tiny, aliases: [small], endpoints: [{{url: 'http://{}'}}, {{url: 'http://{}'}}]}}]",
        pods[0].http, pods[1].http
    ));
    std::fs::write(front.folder.path().join("config.yaml"), text).unwrap();
    front.logged("the changed configuration is applied");
    let both =
        (0..10_000).any(|_| body(&front.get(&front.http, "/v1/models"))["data"][0]["ready_endpoints"] == 2);
    assert!(both, "the added endpoint is not there");
    assert_eq!(front.end_with("-TERM"), Some(0));
}
