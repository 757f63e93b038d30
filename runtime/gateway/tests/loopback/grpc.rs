//! gRPC: calls are forwarded with trailers and statuses, and the gateway has services of its own.

use std::net::SocketAddr;
use std::pin::Pin;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http_body::Frame;
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use trustformers_proto::v1::inference_service_client::InferenceServiceClient;
use trustformers_proto::v1::inference_service_server::{InferenceService, InferenceServiceServer};
use trustformers_proto::v1::model_service_client::ModelServiceClient;
use trustformers_proto::v1::{
    ClassifyRequest, ClassifyResponse, EmbedRequest, EmbedResponse, GenerateRequest, GenerateResponse,
    GenerateStreamResponse, ListModelsRequest, ModelState, RerankRequest, RerankResponse, SessionRequest,
    SessionResponse, WatchModelsRequest,
};

use crate::operator::TableBuilder;
use crate::pods::{Pod, written};
use crate::{Scene, soon, until};

type Pieces = mpsc::Receiver<Result<GenerateStreamResponse, Status>>;

/// A pod with gRPC: it answers or refuses, and streams the messages of a test.
struct GrpcPod {
    refusal: Option<Code>,
    pieces: Mutex<Option<Pieces>>,
}

#[tonic::async_trait]
impl InferenceService for GrpcPod {
    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        if let Some(code) = self.refusal {
            return Err(Status::new(code, "refused by the pod"));
        }
        let model = request.into_inner().model;
        Ok(Response::new(GenerateResponse { model, text: "whole".to_owned(), ..Default::default() }))
    }

    type GenerateStreamStream = Pin<Box<dyn Stream<Item = Result<GenerateStreamResponse, Status>> + Send>>;

    async fn generate_stream(
        &self,
        _request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let pieces = self.pieces.lock().await.take().unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(pieces))))
    }

    type SessionStream = Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>;

    async fn session(
        &self,
        _request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        Err(Status::unimplemented("no test sends a session to this pod"))
    }

    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let EmbedRequest { model, input, .. } = request.into_inner();
        Ok(Response::new(EmbedResponse { model, id: input.join("|"), ..Default::default() }))
    }

    async fn classify(
        &self,
        request: Request<ClassifyRequest>,
    ) -> Result<Response<ClassifyResponse>, Status> {
        let model = request.into_inner().model;
        Ok(Response::new(ClassifyResponse { model, ..Default::default() }))
    }

    async fn rerank(&self, request: Request<RerankRequest>) -> Result<Response<RerankResponse>, Status> {
        let model = request.into_inner().model;
        Ok(Response::new(RerankResponse { model, ..Default::default() }))
    }
}

pub(crate) async fn pod(
    refusal: Option<Code>,
) -> (SocketAddr, mpsc::Sender<Result<GenerateStreamResponse, Status>>) {
    let (sender, pieces) = mpsc::channel(1);
    let service = GrpcPod { refusal, pieces: Mutex::new(Some(pieces)) };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(InferenceServiceServer::new(service))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    (address, sender)
}

async fn caller(scene: &Scene) -> InferenceServiceClient<Channel> {
    InferenceServiceClient::connect(scene.grpc()).await.unwrap()
}

fn request(model: &str) -> GenerateRequest {
    GenerateRequest { prompt: "p".to_owned(), model: model.to_owned(), ..Default::default() }
}

fn text(text: &str) -> Result<GenerateStreamResponse, Status> {
    Ok(GenerateStreamResponse { text: text.to_owned(), ..Default::default() })
}

fn counted(code: &str) -> String {
    format!(
        r#"trustformers_gateway_requests_total{{code="{code}",protocol="grpc",revision="r1",route="default/a"}}"#
    )
}

#[tokio::test]
async fn a_call_is_forwarded_on_either_port() {
    let (pod_address, _pieces) = pod(None).await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod_address])).await;
    for address in [scene.grpc(), format!("http://{}", scene.http())] {
        let mut caller = InferenceServiceClient::connect(address).await.unwrap();
        for model in ["a", "default/a", ""] {
            let answer = caller.generate(request(model)).await.unwrap().into_inner();
            assert_eq!((answer.model.as_str(), answer.text.as_str()), (model, "whole"));
        }
    }
    until("six to be counted", || async { scene.metric(&counted("2xx")).await > 5.5 }).await;
}

#[tokio::test]
async fn messages_pass_one_by_one_and_trailers_last() {
    let (address, pieces) = pod(None).await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[address])).await;
    let mut stream = caller(&scene).await.generate_stream(request("a")).await.unwrap().into_inner();
    for word in ["one", "two", "three"] {
        pieces.send(text(word)).await.unwrap();
        assert_eq!(soon("a message", stream.message()).await.unwrap().unwrap().text, word);
    }
    let mut status = Status::data_loss("after three words");
    status.metadata_mut().insert("x-detail", "d".parse().unwrap());
    pieces.send(Err(status)).await.unwrap();
    let status = soon("the status", stream.message()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::DataLoss, "after three words"));
    assert_eq!(status.metadata().get("x-detail").unwrap(), "d");
    // The head reported success and the trailers the failure, which is counted.
    until("it to be counted", || async { scene.metric(&counted("5xx")).await > 0.5 }).await;
}

/// A message as gRPC frames it.
fn framed(message: &GenerateStreamResponse) -> Bytes {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(&message.encode_to_vec());
    bytes.into()
}

#[tokio::test]
async fn a_stream_whose_pod_dies_ends_with_unavailable() {
    let message = framed(&text("one").unwrap());
    let dying = Pod::start(move |_, _| {
        let message = message.clone();
        async move {
            let (mut answer, writer) = written();
            answer.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            tokio::spawn(async move {
                let _sent = writer.send(Ok(Frame::data(message))).await;
                writer.closed().await;
            });
            Ok(answer)
        }
    })
    .await;
    let table = TableBuilder::new(1, 1).route("a").backend("r1", 1, &[dying.address]);
    let scene = Scene::with_table(table).await;
    let mut stream = caller(&scene).await.generate_stream(request("a")).await.unwrap().into_inner();
    assert_eq!(soon("a message", stream.message()).await.unwrap().unwrap().text, "one");
    dying.kill().await;
    let status = soon("the status", stream.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("send the request again"), "{status}");
    assert_eq!(status.metadata().get("trustformers-error").unwrap(), "bad_upstream");
    until("it to be counted", || async { scene.metric(&counted("broken")).await > 0.5 }).await;
}

#[tokio::test]
async fn a_call_that_is_cancelled_stops_the_pod() {
    let (address, pieces) = pod(None).await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[address])).await;
    let mut stream = caller(&scene).await.generate_stream(request("a")).await.unwrap().into_inner();
    pieces.send(text("one")).await.unwrap();
    soon("a message", stream.message()).await.unwrap().unwrap();
    drop(stream);
    soon("the pod's stream to be reset", pieces.closed()).await;
    until("it to be counted", || async { scene.metric(&counted("cancelled")).await > 0.5 }).await;
}

#[tokio::test]
async fn an_embed_call_finds_its_model_by_name_or_task() {
    let (address, _pieces) = pod(None).await;
    let table =
        TableBuilder::new(1, 1).route("a").backend("r1", 1, &[address]).route("b").backend("r1", 1, &[]);
    let scene = Scene::with_table(table).await;
    let request_for = |model: &str| EmbedRequest {
        input: vec!["x".repeat(300), String::new(), "y".into()],
        model: model.into(),
        ..Default::default()
    };
    let answer = caller(&scene).await.embed(request_for("a")).await.unwrap().into_inner();
    assert_eq!((answer.model.as_str(), answer.id), ("a", format!("{}||y", "x".repeat(300))));
    assert_eq!(caller(&scene).await.embed(request_for("b")).await.unwrap_err().code(), Code::Unavailable);
    // Without a name it is the only one that embeds.
    assert_eq!(caller(&scene).await.embed(request_for("")).await.unwrap_err().code(), Code::InvalidArgument);
    let table = TableBuilder::new(1, 2).route("a").task("embed").backend("r1", 1, &[address]);
    scene.publish(table.route("b").task("generate")).await;
    assert_eq!(caller(&scene).await.embed(request_for("")).await.unwrap().into_inner().model, "");
    assert_eq!(caller(&scene).await.generate(request("")).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn refusals_before_the_first_message_are_retried() {
    for code in [Code::Unavailable, Code::ResourceExhausted] {
        let ((no, _), (yes, _)) = (pod(Some(code)).await, pod(None).await);
        let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[no, yes])).await;
        let mut caller = caller(&scene).await;
        for _ in 0..20 {
            assert_eq!(caller.generate(request("a")).await.unwrap().into_inner().text, "whole", "{code:?}");
        }
        let alone = TableBuilder::new(1, 2).route("a").backend("r1", 1, &[no]);
        scene.publish(alone).await;
        let status = caller.generate(request("a")).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, "refused by the pod"));
    }
}

#[tokio::test]
async fn refusals_of_the_gateway_are_grpc_statuses() {
    let gone = Pod::absent().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let table = TableBuilder::new(1, 1).route("a").backend("r1", 1, &[gone]).route("b").backend("r1", 1, &[]);
    let table = table.route("c").policy(50, 1).backend("r1", 1, &[silent.local_addr().unwrap()]);
    let scene = Scene::with_table(table).await;
    let mut caller = caller(&scene).await;
    for (model, code, word) in [
        ("x", Code::NotFound, "default/a, default/b"),
        ("", Code::InvalidArgument, "choose one of"),
        ("a", Code::Unavailable, "after 1 attempt"),
        ("b", Code::Unavailable, "no pod of default/b"),
        ("c", Code::DeadlineExceeded, "50 ms"),
    ] {
        let status = caller.generate(request(model)).await.unwrap_err();
        assert_eq!(status.code(), code, "{model}: {status}");
        assert!(status.message().contains(word), "{model}: {status}");
        assert!(status.metadata().contains_key("trustformers-error"), "{model}: {status:?}");
    }
    let long = GenerateRequest { prompt: "x".repeat(5 << 20), ..Default::default() };
    assert_eq!(caller.generate(long).await.unwrap_err().code(), Code::OutOfRange);
}

#[tokio::test]
async fn models_are_listed_and_watched() {
    let (address, _pieces) = pod(None).await;
    let table = TableBuilder::new(1, 1).route("a").backend("r1", 1, &[address]).backend("r2", 0, &[]);
    let scene = Scene::with_table(table).await;
    let mut models = ModelServiceClient::connect(scene.grpc()).await.unwrap();
    let list = models.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    let found: Vec<_> =
        list.iter().map(|model| (model.name.as_str(), model.revision.as_str(), model.state())).collect();
    assert_eq!(found, [("default/a", "r1", ModelState::Ready), ("default/a", "r2", ModelState::Pending)]);
    assert_eq!(list[0].digest, "digest-r1");
    let mut watch = models.watch_models(WatchModelsRequest {}).await.unwrap().into_inner();
    assert_eq!(soon("the present state", watch.message()).await.unwrap().unwrap().models.len(), 2);
    scene.publish(TableBuilder::new(1, 2)).await;
    assert_eq!(soon("the change", watch.message()).await.unwrap().unwrap().models.len(), 0);
}

#[tokio::test]
async fn health_follows_readiness_and_reflection_lists_services() {
    let (address, _pieces) = pod(None).await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[address])).await;
    let channel = Channel::from_shared(scene.grpc()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    let service = "trustformers.v1.InferenceService".to_owned();
    let check = tonic_health::pb::HealthCheckRequest { service };
    let status = health.check(check.clone()).await.unwrap().into_inner().status();
    assert_eq!(status.as_str_name(), "SERVING");
    let question = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let answers = reflection.server_reflection_info(futures::stream::iter([question])).await.unwrap();
    let answer = answers.into_inner().next().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(
        names.contains(&"trustformers.v1.InferenceService") && names.contains(&"grpc.health.v1.Health"),
        "{names:?}"
    );
    assert!(!names.iter().any(|name| name.contains("control")), "{names:?}");
    scene.gateway.start_drain();
    let status = health.check(check).await.unwrap().into_inner().status();
    assert_eq!(status.as_str_name(), "NOT_SERVING");
}

#[tokio::test]
async fn an_unknown_service_is_named_in_the_error() {
    let scene = Scene::with_table(TableBuilder::new(1, 1)).await;
    let channel = Channel::from_shared(scene.grpc()).unwrap().connect().await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/trustformers.v1.Elsewhere/Call");
    let codec: tonic_prost::ProstCodec<GenerateRequest, GenerateResponse> =
        tonic_prost::ProstCodec::default();
    let status = grpc.unary(Request::new(request("")), path, codec).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("Elsewhere"), "{status}");
}
