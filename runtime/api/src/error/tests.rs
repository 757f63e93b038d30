//! Tests of errors: every kind in the words of every protocol.

use super::*;
use crate::echo::MAX_ECHO_CHARS;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;

/// One error of each kind, with its HTTP status and its gRPC code.
pub(crate) fn every_kind() -> Vec<(ApiError, u16, Code)> {
    let text = || "m".to_owned();
    vec![
        (ApiError::field("top_p", "no"), 400, Code::InvalidArgument),
        (ApiError::ModelRequired { choices: vec![text()] }, 400, Code::InvalidArgument),
        (ApiError::WrongTask { model: text(), task: Task::Embed }, 400, Code::InvalidArgument),
        (ApiError::Unauthenticated { message: text() }, 401, Code::Unauthenticated),
        (ApiError::Forbidden { message: text() }, 403, Code::PermissionDenied),
        (ApiError::UnknownModel { asked: text(), choices: vec![] }, 404, Code::NotFound),
        (
            ApiError::UnknownRevision { model: text(), asked: text(), loaded: String::new() },
            404,
            Code::NotFound,
        ),
        (ApiError::UnknownRoute { path: text() }, 404, Code::NotFound),
        (ApiError::MethodNotAllowed { method: text(), path: text() }, 405, Code::Unimplemented),
        (ApiError::Conflict { message: text() }, 409, Code::Aborted),
        (ApiError::TooLong { message: text() }, 413, Code::OutOfRange),
        (ApiError::UnsupportedEncoding { encoding: text() }, 415, Code::Unimplemented),
        (ApiError::Overloaded { message: text(), retry_after_s: 2 }, 429, Code::ResourceExhausted),
        (ApiError::Unavailable { message: text(), retry_after_s: None }, 503, Code::Unavailable),
        (ApiError::Unavailable { message: text(), retry_after_s: Some(2) }, 503, Code::Unavailable),
        (ApiError::Timeout { message: text() }, 408, Code::DeadlineExceeded),
        (ApiError::Internal { message: text() }, 500, Code::Internal),
    ]
}

#[test]
fn each_kind_has_a_status_a_code_and_its_name_in_both() {
    for (error, status, code) in every_kind() {
        let kind = error.kind();
        let grpc = Status::from(error.clone());
        assert_eq!(grpc.code(), code, "{kind}");
        assert_eq!(grpc.metadata().get(GRPC_KIND_KEY).unwrap(), kind);
        assert_eq!(error.to_json()["error"]["type"], kind);
        assert_eq!(error.into_response().status().as_u16(), status, "{kind}");
    }
}

#[test]
fn overload_has_a_retry_time_in_both() {
    let error = ApiError::Overloaded { message: "full".into(), retry_after_s: 3 };
    assert_eq!(Status::from(error.clone()).metadata().get(GRPC_RETRY_AFTER_KEY).unwrap(), "3");
    assert_eq!(error.into_response().headers()[header::RETRY_AFTER], "3");
}

#[test]
fn an_unknown_model_lists_the_choices() {
    let error = ApiError::UnknownModel { asked: "x".into(), choices: vec!["a".into(), "b".into()] };
    assert_eq!(error.to_string(), "no model answers to \"x\"; known are: a, b");
    assert_eq!(error.to_json()["error"]["choices"], json!(["a", "b"]));
}

#[test]
fn no_error_repeats_more_than_a_bounded_piece_of_its_request() {
    let long = "\u{e9}".repeat(1 << 20);
    let names: Vec<String> = (0..10_000).map(|index| format!("model-{index}")).collect();
    let errors = [
        ApiError::field(&long, "there is no such field"),
        ApiError::InvalidRequest { field: Some(long.clone()), message: long.clone() },
        ApiError::UnknownModel { asked: long.clone(), choices: names },
        ApiError::UnknownRevision { model: "m".into(), asked: long.clone(), loaded: "r".into() },
        ApiError::UnknownRoute { path: long.clone() },
        ApiError::MethodNotAllowed { method: long.clone(), path: long.clone() },
    ];
    for error in errors {
        assert!(error.to_json().to_string().len() < 5000, "{}", error.kind());
        assert!(Status::from(error).message().chars().count() <= MAX_MESSAGE_CHARS + 3);
    }
}

/// What OpenAI's and Anthropic's clients call an error of this kind.
fn foreign_types(kind: &str) -> [&'static str; 2] {
    match kind {
        "unknown_model" | "unknown_revision" | "unknown_route" => {
            ["invalid_request_error", "not_found_error"]
        }
        "forbidden" => ["invalid_request_error", "permission_error"],
        "unauthenticated" => ["invalid_request_error", "authentication_error"],
        "too_long" => ["invalid_request_error", "request_too_large"],
        "overloaded" => ["rate_limit_error", "overloaded_error"],
        "timeout" => ["server_error", "timeout_error"],
        "unavailable" | "internal" => ["server_error", "api_error"],
        _ => ["invalid_request_error"; 2],
    }
}

/// An HTTP answer that was read.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Answered {
    pub(crate) async fn read(response: Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        Self { status, headers, body: serde_json::from_slice(&bytes).unwrap() }
    }
}

/// Checks status, headers and body of an HTTP answer.
pub(crate) fn assert_in_shape(error: &ApiError, shape: ErrorShape, answer: &Answered) {
    let Answered { status, headers, body } = answer;
    let (kind, message) = (error.kind(), json!(error.message()));
    let overloaded = shape == ErrorShape::Anthropic && kind == "overloaded";
    let wanted = if overloaded { 529 } else { error.status().as_u16() };
    assert_eq!(status.as_u16(), wanted, "{kind} {shape:?}");
    assert_eq!(headers[header::CONTENT_TYPE], "application/json", "{kind} {shape:?}");
    let [openai, anthropic] = foreign_types(kind);
    match shape {
        ErrorShape::Native => {
            assert_eq!((&body["error"]["type"], &body["error"]["message"]), (&json!(kind), &message));
        }
        ErrorShape::OpenAi => {
            let error = &body["error"];
            assert_eq!((&error["type"], &error["message"]), (&json!(openai), &message), "{kind}");
            let code = if kind == "unknown_model" { "model_not_found" } else { kind };
            assert_eq!(error["code"], code);
            assert!(error.as_object().unwrap().contains_key("param"), "{kind}: {body}");
        }
        ErrorShape::Anthropic => {
            assert_eq!(body["type"], "error");
            assert_eq!(body["error"], json!({"type": anthropic, "message": message}), "{kind}");
        }
        ErrorShape::KserveHttp => assert_eq!(*body, json!({"error": message}), "{kind}"),
        ErrorShape::Grpc => panic!("no JSON"),
    }
    let seconds = error.retry_after_s().map(u64::from);
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().parse::<u64>().unwrap());
    assert_eq!((header("retry-after"), header("retry-after-ms")), (seconds, seconds.map(|s| s * 1000)));
    let callers = status.is_client_error() && kind != "overloaded";
    let lasting = kind == "unavailable" && seconds.is_none();
    assert_eq!(
        headers.get("x-should-retry").is_some_and(|value| value == "false"),
        callers || lasting,
        "{kind}"
    );
}

#[tokio::test]
async fn every_kind_is_written_in_the_words_of_every_protocol() {
    for (error, _, code) in every_kind() {
        for &shape in ErrorShape::ALL {
            let response = error.render(shape);
            if shape == ErrorShape::Grpc {
                let read = Status::from_header_map(response.headers()).unwrap();
                assert_eq!((response.status(), read.code()), (StatusCode::OK, code));
                assert_eq!(response.headers()[GRPC_KIND_KEY], error.kind());
            } else {
                assert_in_shape(&error, shape, &Answered::read(response).await);
            }
        }
    }
}

#[test]
fn openai_clients_read_the_field_and_what_native_errors_say() {
    let error = ApiError::field("top_p", "no").to_json_in(ErrorShape::OpenAi)["error"].clone();
    assert_eq!((&error["param"], &error["field"]), (&json!("top_p"), &json!("top_p")));
    let error = ApiError::UnknownModel { asked: "x".into(), choices: vec!["a".into()] };
    let error = error.to_json_in(ErrorShape::OpenAi)["error"].clone();
    assert_eq!((&error["param"], &error["choices"]), (&json!("model"), &json!(["a"])));
    let error = ApiError::Internal { message: "m".into() }.to_json_in(ErrorShape::OpenAi)["error"].clone();
    assert_eq!(error["param"], Value::Null);
    let long = ApiError::field(&"x".repeat(1 << 20), "no").to_json_in(ErrorShape::OpenAi);
    assert!(long["error"]["param"].as_str().unwrap().len() <= MAX_ECHO_CHARS + 3);
}
