//! The gRPC services over a real connection to the fake server of models.

use super::*;
use crate::fake::{Fake, Script};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use v1::inference_service_client::InferenceServiceClient;
use v1::model_service_client::ModelServiceClient;

/// A real server on a free port of the loopback, and a channel to it.
pub(super) async fn start(fake: &Fake) -> (Channel, CancellationToken, tokio::task::JoinHandle<()>) {
    let listener = crate::server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let task = tokio::spawn(crate::server::serve(
        listener,
        router(fake.api()).unwrap(),
        crate::server::Limits::default(),
        stop.clone(),
    ));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    (channel, stop, task)
}

pub(super) fn prompt(text: &str) -> v1::GenerateRequest {
    v1::GenerateRequest { prompt: text.into(), ..Default::default() }
}

#[tokio::test]
async fn a_whole_answer_is_complete_and_zeros_mean_defaults() {
    let fake = Fake::with(Script::tokens(&["Hello", " you"]));
    let (channel, ..) = start(&fake).await;
    let answer = InferenceServiceClient::new(channel).generate(prompt("Say")).await.unwrap().into_inner();
    assert_eq!((answer.text.as_str(), answer.tokens.as_slice()), ("Hello you", [0, 1].as_slice()));
    assert_eq!(answer.finish_reason(), v1::FinishReason::Stop);
    assert_eq!(answer.usage.unwrap().total_tokens, 5);
    assert_eq!((answer.model_digest.as_str(), answer.revision.as_str()), ("d1", "r1"));
    let asked = fake.last_request();
    assert_eq!((asked.max_tokens, asked.temperature, asked.top_p), (100, 0.0, 0.9));
}

#[tokio::test]
async fn the_last_message_of_a_stream_has_the_reason_and_no_token() {
    let fake = Fake::with(Script::tokens(&["a", "b"]));
    let (channel, ..) = start(&fake).await;
    let stream =
        InferenceServiceClient::new(channel).generate_stream(prompt("x")).await.unwrap().into_inner();
    let all: Vec<_> = stream.map(Result::unwrap).collect().await;
    assert_eq!(all.iter().map(|message| message.text.as_str()).collect::<String>(), "ab");
    let last = all.last().unwrap();
    assert_eq!((last.finish_reason(), last.text.as_str()), (v1::FinishReason::Stop, ""));
    assert!(all[..2].iter().all(|message| message.finish_reason == 0 && message.usage.is_none()));
}

#[tokio::test]
async fn options_reach_the_server_and_their_results_come_back() {
    let fake = Fake::with(Script::tokens(&["a", "b"]).with_logprobs().stopped_by(StoppedBy::Token(9)));
    let (channel, ..) = start(&fake).await;
    let mut client = InferenceServiceClient::new(channel);
    let format = v1::response_format::Format::JsonSchema("{}".into());
    let request = v1::GenerateRequest {
        stop_token_ids: vec![9],
        logprobs: Some(1),
        response_format: Some(v1::ResponseFormat { format: Some(format) }),
        ..prompt("x")
    };
    let whole = client.generate(request.clone()).await.unwrap().into_inner();
    let each = v1::Logprobs { logprob: -0.5, top: vec![v1::TokenLogprob { token: 7, logprob: -0.25 }] };
    assert_eq!(whole.logprobs, [each.clone(), each.clone()]);
    assert_eq!(whole.stopped_by, Some(v1::generate_response::StoppedBy::StopToken(9)));
    let options = fake.last_request().options;
    assert_eq!((options.stop_token_ids, options.logprobs), (vec![9], Some(1)));
    assert_eq!(options.format, Some(crate::Format::JsonSchema("{}".into())));

    let stream = client.generate_stream(request).await.unwrap().into_inner();
    let all: Vec<_> = stream.map(Result::unwrap).collect().await;
    assert_eq!(all[0].logprobs, Some(each));
    assert_eq!(all[2].stopped_by, Some(v1::generate_stream_response::StoppedBy::StopToken(9)));
}

#[tokio::test]
async fn the_priority_field_overrides_the_metadata_key() {
    let fake = Fake::with(Script::tokens(&["a"]));
    let (channel, ..) = start(&fake).await;
    let mut client = InferenceServiceClient::new(channel);
    let prompt = v1::GenerateRequest { prompt: "Say".into(), ..Default::default() };
    let mut request = Request::new(prompt.clone());
    request.metadata_mut().insert("x-trustformers-priority", "low".parse().unwrap());
    request.metadata_mut().insert("x-gateway-inference-fairness-id", "team-1".parse().unwrap());
    client.generate(request).await.unwrap();
    let asked = fake.last_request();
    assert_eq!((asked.priority, asked.tenant.as_str()), (crate::Priority::Low, "team-1"));
    let high = v1::GenerateRequest { priority: v1::Priority::High as i32, ..prompt };
    client.generate_stream(high.clone()).await.unwrap();
    assert_eq!(fake.last_request().priority, crate::Priority::High);
    let status = client.generate(v1::GenerateRequest { priority: 9, ..high }).await.unwrap_err();
    assert!(
        status.code() == Code::InvalidArgument && status.message().starts_with("priority: 9"),
        "{status}"
    );
}

#[tokio::test]
async fn texts_or_ids_become_vectors_in_the_order_of_the_request() {
    let fake = Fake::with(Script::tokens(&[]));
    let (channel, ..) = start(&fake).await;
    let mut client = InferenceServiceClient::new(channel);
    let texts = v1::EmbedRequest { input: vec!["a".into(), String::new()], ..Default::default() };
    let mut request = Request::new(texts.clone());
    request.metadata_mut().insert("x-trustformers-priority", "low".parse().unwrap());
    request.metadata_mut().insert("x-gateway-inference-fairness-id", "team-1".parse().unwrap());
    let answer = client.embed(request).await.unwrap().into_inner();
    assert_eq!(answer.data.iter().map(|one| one.values.len()).collect::<Vec<_>>(), [2, 2]);
    assert_eq!((answer.pooling(), answer.model.as_str()), (v1::Pooling::Mean, "fake"));
    assert_eq!((answer.usage.unwrap().prompt_tokens, answer.truncated.as_slice()), (6, [0].as_slice()));
    let asked = fake.last_embedding();
    assert_eq!((asked.priority, asked.truncate, asked.model), (crate::Priority::Low, true, None));
    assert_eq!(asked.tenant, "team-1");
    let ids = v1::TokenIds { ids: vec![3, 4] };
    let tokens = v1::EmbedRequest { input_tokens: vec![ids], truncate: Some(false), ..Default::default() };
    let tokens = v1::EmbedRequest { priority: v1::Priority::High as i32, ..tokens };
    client.embed(tokens.clone()).await.unwrap();
    let asked = fake.last_embedding();
    assert_eq!((asked.priority, asked.truncate), (crate::Priority::High, false));
    assert_eq!(asked.input, [crate::EmbedInput::Tokens(vec![3, 4])]);
    for (request, text) in [
        (v1::EmbedRequest { input: vec!["a".into()], ..tokens }, "input_tokens: "),
        (v1::EmbedRequest::default(), "input: is empty"),
        (v1::EmbedRequest { priority: 9, ..texts }, "priority: 9"),
    ] {
        let status = client.embed(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(text), "{status}");
    }
}

#[tokio::test]
async fn a_refusal_before_the_first_token_is_the_calls_own_status() {
    let error = ApiError::Overloaded { message: "full".into(), retry_after_s: 1 };
    for script in [Script::refused(error.clone()), Script::fails_before_a_token(error.clone())] {
        let (channel, ..) = start(&Fake::with(script)).await;
        let status = InferenceServiceClient::new(channel).generate_stream(prompt("x")).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
    }
}

#[tokio::test]
async fn dropping_a_stream_or_a_call_cancels_it() {
    let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
    let (channel, ..) = start(&fake).await;
    let mut client = InferenceServiceClient::new(channel);
    let stream = client.generate_stream(prompt("x")).await.unwrap();
    fake.until_running(1).await;
    drop(stream);
    fake.until_running(0).await;
    let mut other = client.clone();
    let call = tokio::spawn(async move { other.generate(prompt("x")).await });
    fake.until_running(1).await;
    call.abort();
    fake.until_running(0).await;
}

#[tokio::test]
async fn a_watch_of_models_does_not_hold_up_the_end_of_the_server() {
    let fake = Fake::with(Script::tokens(&[]));
    let (channel, stop, task) = start(&fake).await;
    let mut watch = ModelServiceClient::new(channel).watch_models(v1::WatchModelsRequest {}).await.unwrap();
    let first = watch.get_mut().message().await.unwrap().unwrap();
    assert_eq!((first.models[0].name.as_str(), first.models[0].state()), ("fake", v1::ModelState::Ready));
    fake.api().closing.cancel();
    stop.cancel();
    assert!(watch.get_mut().message().await.unwrap().is_none());
    task.await.unwrap();
}

#[tokio::test]
async fn a_message_beyond_the_bound_is_refused() {
    let (channel, ..) = start(&Fake::with(Script::tokens(&["a"]))).await;
    let status = InferenceServiceClient::new(channel)
        .generate(prompt(&"x".repeat(MAX_BODY_BYTES + 1)))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
}

#[tokio::test]
async fn a_compressed_message_is_read_and_its_answer_is_compressed() {
    let fake = Fake::with(Script::tokens(&["a"]));
    let (channel, ..) = start(&fake).await;
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Zstd] {
        let accepts = InferenceServiceClient::new(channel.clone()).accept_compressed(encoding);
        let mut plain = accepts.clone();
        let mut compressed = accepts.send_compressed(encoding);
        let name = encoding.to_string();
        let answer = compressed.generate(prompt("Say")).await.unwrap();
        assert_eq!(answer.metadata().get(ENCODING_KEY).unwrap(), name.as_str());
        assert_eq!((answer.get_ref().text.as_str(), fake.last_request().prompt), ("a", "Say".into()));
        let answer = compressed.generate_stream(prompt("Say")).await.unwrap();
        assert!(answer.metadata().get(ENCODING_KEY).is_none(), "streams are not compressed");
        let answer = plain.generate(prompt("Say")).await.unwrap();
        assert!(answer.metadata().get(ENCODING_KEY).is_none(), "an offer alone is not enough");
    }
}

#[tokio::test]
async fn a_compressed_message_that_is_too_long_or_not_known_is_the_callers_fault() {
    let (channel, ..) = start(&Fake::with(Script::tokens(&["a"]))).await;
    let long = prompt(&" ".repeat(MAX_BODY_BYTES + 1));
    let mut client = InferenceServiceClient::new(channel.clone()).send_compressed(CompressionEncoding::Zstd);
    let status = client.generate(long).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert_eq!(status.metadata().get(GRPC_KIND_KEY).unwrap(), "too_long");
    for (encoding, code, kind) in [
        ("snappy", Code::Unimplemented, "unsupported_encoding"),
        ("gzip", Code::InvalidArgument, "invalid_request"),
    ] {
        let status = call_frame(channel.clone(), Some(encoding), &[1, 0, 0, 0, 2, b'h', b'i']).await;
        assert_eq!(status.code(), code, "{status}");
        assert_eq!(status.metadata().get(GRPC_KIND_KEY).unwrap(), kind);
    }
    let status = call_frame(channel, Some("snappy"), &[0; 5]).await;
    assert!(status.message().contains("snappy"), "{status}");
}

#[test]
fn a_compressed_message_counts_with_its_decoded_bytes() {
    let limits = crate::server::Limits::default();
    let mut request = Request::new(prompt(&"x".repeat(1000)));
    request.extensions_mut().insert(limits.of(crate::budget::Caller::at([127, 0, 0, 1].into())));
    assert!(decoded_share(&request).unwrap().is_none(), "the listener counted its bytes");
    request.metadata_mut().insert(ENCODING_KEY, "gzip".parse().unwrap());
    let share = decoded_share(&request).unwrap().unwrap();
    assert_eq!((share.units(), limits.request_bytes.used()), (1003, 1003));
}

#[tokio::test]
async fn the_older_reflection_is_served_too() {
    use tonic_reflection::pb::v1alpha::ServerReflectionRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse;
    let (channel, ..) = start(&Fake::with(Script::tokens(&[]))).await;
    let symbol = "trustformers.v1.InferenceService.Session".to_owned();
    let asks = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::FileContainingSymbol(symbol)),
    };
    let requests = futures::stream::iter([asks]);
    let mut answers =
        ServerReflectionClient::new(channel).server_reflection_info(requests).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::FileDescriptorResponse(files) = answer else { panic!("{answer:?}") };
    assert!(!files.file_descriptor_proto.is_empty());
}

#[tokio::test]
async fn reflection_lists_what_is_served() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let (channel, ..) = start(&Fake::with(Script::tokens(&[]))).await;
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let requests = futures::stream::iter([ask]);
    let mut answers =
        ServerReflectionClient::new(channel).server_reflection_info(requests).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in SERVICES {
        assert!(names.contains(service), "{names:?}");
    }
    assert!(!names.iter().any(|name| name.contains("control")), "{names:?}");
}

/// Sends raw bytes as the message of a call and gives the status.
async fn call_raw(channel: Channel, message: Vec<u8>) -> Status {
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(&message);
    call_frame(channel, None, &frame).await
}

/// Sends the bytes of a frame in a call with this encoding, and gives the status.
async fn call_frame(channel: Channel, encoding: Option<&str>, frame: &[u8]) -> Status {
    let mut request = axum::http::Request::post("/trustformers.v1.InferenceService/Generate")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(http_body_util::Full::from(frame.to_vec())))
        .unwrap();
    if let Some(encoding) = encoding {
        request.headers_mut().insert(ENCODING_KEY, HeaderValue::from_str(encoding).unwrap());
    }
    let response = channel.oneshot(request).await.unwrap();
    Status::from_header_map(response.headers()).unwrap()
}

#[tokio::test]
async fn messages_that_cannot_be_read_are_the_callers_fault() {
    let fake = Fake::with(Script::tokens(&["a"]));
    let (channel, ..) = start(&fake).await;
    for message in [vec![0x0a, 2, 0xff, 0xfe], vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0xff]] {
        let status = call_raw(channel.clone(), message).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert_eq!(status.metadata().get(GRPC_KIND_KEY).unwrap(), "invalid_request");
    }
}

#[tokio::test]
async fn messages_over_the_limit_have_a_code_and_a_kind() {
    let fake = Fake::with(Script::tokens(&["a"]));
    let (channel, ..) = start(&fake).await;
    let mut client = InferenceServiceClient::new(channel);
    let status = client.generate(prompt(&"a".repeat(5 << 20))).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert_eq!(status.metadata().get(GRPC_KIND_KEY).unwrap(), "too_long");
}

#[tokio::test]
async fn a_long_name_comes_back_cut_in_the_message() {
    let error = ApiError::UnknownModel { asked: "n".repeat(100_000), choices: vec!["a".into()] };
    let fake = Fake::with(Script::refused(error));
    let (channel, ..) = start(&fake).await;
    let status = InferenceServiceClient::new(channel).generate(prompt("a")).await.unwrap_err();
    assert!(status.code() == Code::NotFound && status.message().len() < 500, "{}", status.message().len());
}

#[tokio::test]
async fn models_are_loaded_and_unloaded_by_name() {
    let fake = Fake::with(Script::tokens(&[]));
    let (channel, ..) = start(&fake).await;
    let mut client = ModelServiceClient::new(channel);
    let request = v1::LoadModelRequest { name: "a".into(), path: "/m".into(), ..Default::default() };
    let loaded = client.load_model(request).await.unwrap().into_inner().model.unwrap();
    assert_eq!((loaded.name.as_str(), loaded.state()), ("a", v1::ModelState::Ready));
    assert_eq!(fake.last_load().path, "/m");
    let unload = |model: &str| v1::UnloadModelRequest { model: model.into(), ..Default::default() };
    let unloaded = client.unload_model(unload("fake")).await.unwrap().into_inner().model.unwrap();
    assert_eq!(unloaded.state(), v1::ModelState::Unloaded);
    let status = client.load_model(v1::LoadModelRequest::default()).await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().starts_with("name: "), "{status}");
    let status = client.unload_model(unload("")).await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().starts_with("model: "), "{status}");
}
