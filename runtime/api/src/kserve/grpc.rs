//! The service `inference.GRPCInferenceService`.

use std::sync::Arc;

use axum::http::HeaderMap;
use futures::StreamExt;
use futures::stream::BoxStream;
use prost::Message as _;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
use trustformers_proto::inference::grpc_inference_service_server::{
    GrpcInferenceService, GrpcInferenceServiceServer,
};
use trustformers_proto::inference::{
    ModelConfigRequest, ModelConfigResponse, ModelInferRequest, ModelInferResponse, ModelMetadataRequest,
    ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse, ModelStatisticsRequest,
    ModelStatisticsResponse, ModelStreamInferResponse, RepositoryIndexRequest, RepositoryIndexResponse,
    ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest,
    ServerReadyResponse,
};

use super::infer::prepare;
use super::messages;
use super::metadata;
use crate::echo::echo;
use crate::grpc::decoded_share;
use crate::inference::Models;
use crate::limits::CallerLimits;
use crate::{Api, ApiError, MAX_BODY_BYTES};

/// The full name of the service.
pub(crate) const SERVICE: &str = "inference.GRPCInferenceService";

/// Requests of one stream that are answered at a time: an eighth of the 512 that may wait in the engine's
/// queue. A further one is read when one of them has ended.
const MAX_STREAM_REQUESTS: usize = 64;

/// The service over `api`.
pub(crate) fn service(api: Api) -> GrpcInferenceServiceServer<Api> {
    GrpcInferenceServiceServer::new(api).max_decoding_message_size(MAX_BODY_BYTES)
}

fn models(api: &Api) -> Models {
    api.inference.watch_models().borrow().clone()
}

#[tonic::async_trait]
impl GrpcInferenceService for Api {
    async fn server_live(
        &self,
        _: Request<ServerLiveRequest>,
    ) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: self.inference.liveness().ok }))
    }

    async fn server_ready(
        &self,
        _: Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        let ready = self.inference.readiness().borrow().ok;
        Ok(Response::new(ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let models = models(self);
        // As Triton has it, a model that there is not is not ready.
        let ready = metadata::find(&models, &name, &version).is_ok_and(metadata::is_ready);
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(metadata::server()))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let models = models(self);
        let described = metadata::describe_model(metadata::find(&models, &name, &version)?)?;
        Ok(Response::new(described.into()))
    }

    async fn model_config(
        &self,
        request: Request<ModelConfigRequest>,
    ) -> Result<Response<ModelConfigResponse>, Status> {
        let ModelConfigRequest { name, version } = request.into_inner();
        let models = models(self);
        let config = metadata::config(metadata::find(&models, &name, &version)?)?;
        Ok(Response::new(ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        request: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        let ModelStatisticsRequest { name, version } = request.into_inner();
        let models = models(self);
        let model_stats = if name.is_empty() {
            models.iter().map(|model| self.kserve_counts.message(model)).collect()
        } else {
            vec![self.kserve_counts.message(metadata::find(&models, &name, &version)?)]
        };
        Ok(Response::new(ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<RepositoryIndexRequest>,
    ) -> Result<Response<RepositoryIndexResponse>, Status> {
        let RepositoryIndexRequest { repository_name, ready } = request.into_inner();
        if !repository_name.is_empty() {
            let name = echo(&repository_name);
            let why =
                format!("{name:?}: the models here are in one repository without a name; leave it empty");
            return Err(ApiError::field("repository_name", why).into());
        }
        Ok(Response::new(RepositoryIndexResponse { models: metadata::index(&models(self), ready) }))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let _share = decoded_share(&request)?;
        let (metadata, _, message) = request.into_parts();
        let parsed = messages::parse(message)?.outside_a_stream()?;
        let whole = prepare(&models(self), parsed.request, metadata.as_ref())?.answer(self).await?;
        let mut response = Response::new(messages::write(whole.answer, parsed.form));
        *response.metadata_mut() = MetadataMap::from_headers(whole.headers);
        Ok(response)
    }

    type ModelStreamInferStream = BoxStream<'static, Result<ModelStreamInferResponse, Status>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let (metadata, extensions, requests) = request.into_parts();
        let headers = Arc::new(metadata.into_headers());
        let limits = extensions.get::<CallerLimits>().cloned().unwrap_or_default();
        let api = self.clone();
        // When the server ends, no further request is read, and those that were are answered.
        let closed = self.closing.clone().cancelled_owned();
        let answers = requests.take_until(closed).map(move |message| match message {
            Ok(message) => answers_to(api.clone(), message, Arc::clone(&headers), &limits),
            Err(status) => futures::stream::once(async { Err(status) }).boxed(),
        });
        Ok(Response::new(answers.flatten_unordered(MAX_STREAM_REQUESTS).boxed()))
    }
}

/// The answers to one request of a stream. A failure is an answer, too: the stream goes on. The listener
/// counts the bytes of a message until it is complete; from then on they count here, with the answer, until
/// it ends.
fn answers_to(
    api: Api,
    message: ModelInferRequest,
    headers: Arc<HeaderMap>,
    limits: &CallerLimits,
) -> BoxStream<'static, Result<ModelStreamInferResponse, Status>> {
    let (model, id) = (message.model_name.clone(), message.id.clone());
    let shares = limits.request_bytes(message.encoded_len()).and_then(|bytes| Ok((bytes, limits.answer()?)));
    let shares = match shares {
        Ok(shares) => shares,
        Err(error) => {
            let failure = messages::write_failure(&error, &model, &id);
            return futures::stream::once(async { Ok(failure) }).boxed();
        }
    };
    let failure = move |error: &ApiError| messages::write_failure(error, &model, &id);
    let started = async move {
        let parsed = messages::parse(message)?;
        let prepared = prepare(&models(&api), parsed.request, &headers)?;
        let answer = prepared.parts(&api, false).await?;
        Ok::<_, ApiError>(
            answer.parts.map(move |part| part.map(|part| messages::write_in_stream(part, parsed.form))),
        )
    };
    let written = futures::stream::once(started).flat_map(|started| match started {
        Ok(parts) => parts.boxed(),
        Err(error) => futures::stream::once(async { Err(error) }).boxed(),
    });
    let messages = written.flat_map(move |part| {
        let _held_until_the_answer_ends = &shares;
        let messages = part.unwrap_or_else(|error| vec![failure(&error)]);
        futures::stream::iter(messages.into_iter().map(Ok))
    });
    messages.boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::{EmbedInput, Prompt};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;
    use tokio_util::sync::CancellationToken;
    use tonic::Code;
    use tonic::transport::Channel;
    use trustformers_proto::Task;
    use trustformers_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
    use trustformers_proto::inference::infer_parameter::ParameterChoice;
    use trustformers_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
    use trustformers_proto::inference::{InferParameter, InferTensorContents};

    type TensorClient = GrpcInferenceServiceClient<Channel>;

    /// A client of a real server on a free port of the loopback.
    async fn client(fake: &Fake) -> TensorClient {
        let listener = crate::server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = crate::grpc::router(fake.api()).unwrap();
        let limits = crate::server::Limits::default();
        tokio::spawn(crate::server::serve(listener, router, limits, CancellationToken::new()));
        TensorClient::new(Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap())
    }

    fn generating(script: Script) -> Fake {
        Fake::with(script).with_task(Task::Generate)
    }

    fn texts(name: &str, texts: &[&str]) -> InferInputTensor {
        let bytes_contents = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        InferInputTensor {
            name: name.into(),
            datatype: "BYTES".into(),
            shape: vec![i64::try_from(texts.len()).unwrap()],
            contents: Some(InferTensorContents { bytes_contents, ..Default::default() }),
            ..Default::default()
        }
    }

    fn request(id: &str, inputs: Vec<InferInputTensor>) -> ModelInferRequest {
        ModelInferRequest { model_name: "ns/fake".into(), id: id.into(), inputs, ..Default::default() }
    }

    fn streamed(id: &str) -> ModelInferRequest {
        let stream = InferInputTensor {
            name: "stream".into(),
            datatype: "BOOL".into(),
            shape: vec![1],
            contents: Some(InferTensorContents { bool_contents: vec![true], ..Default::default() }),
            ..Default::default()
        };
        request(id, vec![texts("text_input", &["Hi"]), stream])
    }

    const TOO_MANY_FIELDS: &str = "the message has more than 1024 fields, list elements counted";

    fn flag(value: bool) -> InferParameter {
        InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(value)) }
    }

    #[tokio::test]
    async fn the_server_and_its_model_are_described() {
        let fake = generating(Script::tokens(&["a"]));
        let mut client = client(&fake).await;
        assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
        assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
        let server = client.server_metadata(ServerMetadataRequest {}).await.unwrap().into_inner();
        assert_eq!((server.name.as_str(), server.extensions.len()), ("trustformers-serve", 5));
        let named = |name: &str| ModelReadyRequest { name: name.into(), version: String::new() };
        assert!(client.model_ready(named("fake")).await.unwrap().into_inner().ready);
        assert!(!client.model_ready(named("other")).await.unwrap().into_inner().ready);
        let asked = ModelMetadataRequest { name: "ns/fake".into(), version: "r1".into() };
        let model = client.model_metadata(asked).await.unwrap().into_inner();
        assert_eq!((model.name.as_str(), model.inputs[0].name.as_str()), ("fake", "text_input"));
        let asked = ModelConfigRequest { name: "fake".into(), version: String::new() };
        let config = client.model_config(asked).await.unwrap().into_inner().config.unwrap();
        assert!(config.model_transaction_policy.unwrap().decoupled && config.input[1].optional);
        let index = client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner();
        assert_eq!((index.models[0].name.as_str(), index.models[0].state.as_str()), ("fake", "READY"));
        let named = RepositoryIndexRequest { repository_name: "r".into(), ready: false };
        assert_eq!(client.repository_index(named).await.unwrap_err().code(), Code::InvalidArgument);
        client.model_infer(request("", vec![texts("text_input", &["a", "b"])])).await.unwrap();
        let all = client.model_statistics(ModelStatisticsRequest::default()).await.unwrap().into_inner();
        assert_eq!((all.model_stats[0].inference_count, all.model_stats[0].execution_count), (2, 1));
        let one = ModelStatisticsRequest { name: "fake".into(), version: String::new() };
        assert_eq!(client.model_statistics(one).await.unwrap().into_inner().model_stats.len(), 1);
    }

    #[tokio::test]
    async fn answers_are_typed_or_raw_as_their_requests() {
        let fake = generating(Script::tokens(&["Hel", "lo"]));
        let mut client = client(&fake).await;
        let response = client.model_infer(request("7", vec![texts("text_input", &["Hi"])])).await.unwrap();
        assert_eq!(response.metadata().get("x-trustformers-revision").unwrap(), "r1");
        let typed = response.into_inner();
        assert_eq!(
            (typed.id.as_str(), typed.model_name.as_str(), typed.model_version.as_str()),
            ("7", "fake", "r1")
        );
        assert_eq!(typed.outputs[0].contents.as_ref().unwrap().bytes_contents, [b"Hello"]);
        assert_eq!(typed.outputs[2].contents.as_ref().unwrap().uint_contents, [3]);
        assert!(typed.raw_output_contents.is_empty());
        let half = InferInputTensor {
            name: "temperature".into(),
            datatype: "FP16".into(),
            shape: vec![1],
            ..Default::default()
        };
        let prompt = InferInputTensor { contents: None, ..texts("text_input", &["Hi"]) };
        let raw = ModelInferRequest {
            raw_input_contents: vec![vec![2, 0, 0, 0, b'H', b'i'], vec![0x00, 0x38]],
            outputs: vec![InferRequestedOutputTensor { name: "text_output".into(), ..Default::default() }],
            ..request("", vec![prompt, half])
        };
        let answer = client.model_infer(raw).await.unwrap().into_inner();
        assert_eq!((answer.outputs.len(), answer.outputs[0].contents.is_none()), (1, true));
        assert_eq!(answer.raw_output_contents, [b"\x05\0\0\0Hello"]);
        let asked = fake.last_request();
        assert_eq!((asked.prompt, asked.temperature), (Prompt::from("Hi"), 0.5));
    }

    #[tokio::test]
    async fn vectors_come_as_rows() {
        let fake = Fake::with(Script::tokens(&[])).with_task(Task::Embed);
        let answer =
            client(&fake).await.model_infer(request("", vec![texts("text", &["a", "b"])])).await.unwrap();
        let answer = answer.into_inner();
        assert_eq!(
            (answer.outputs[0].shape.as_slice(), answer.outputs[0].datatype.as_str()),
            ([2, 2].as_slice(), "FP32")
        );
        assert_eq!(answer.outputs[0].contents.as_ref().unwrap().fp32_contents, [0.0, 0.1, 1.0, 0.1]);
        assert_eq!(answer.parameters["prompt_tokens"].parameter_choice, Some(ParameterChoice::Int64Param(6)));
        assert_eq!(fake.last_embedding().input[0], EmbedInput::Text("a".into()));
    }

    #[tokio::test]
    async fn refusals_have_their_code_and_name_the_tensor() {
        let fake = generating(Script::tokens(&["a"]));
        let mut client = client(&fake).await;
        for (message, text) in [
            (request("", vec![texts("prompt", &["a"])]), "prompt: the model has no such input"),
            (streamed(""), "stream: true asks for pieces"),
            (
                ModelInferRequest {
                    parameters: [("triton_enable_empty_final_response".to_owned(), flag(true))].into(),
                    ..request("", vec![texts("text_input", &["a"])])
                },
                "triton_enable_empty_final_response: is for ModelStreamInfer",
            ),
        ] {
            let status = client.model_infer(message).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().starts_with(text), "{status}");
        }
        let unknown = ModelInferRequest { model_name: "other".into(), ..streamed("") };
        assert_eq!(client.model_infer(unknown).await.unwrap_err().code(), Code::NotFound);
    }

    #[tokio::test]
    async fn a_message_of_many_tensors_is_refused_before_it_takes_their_memory() {
        let fake = generating(Script::tokens(&["a"]));
        let many = request("", vec![InferInputTensor::default(); 2000]);
        let status = client(&fake).await.model_infer(many).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, TOO_MANY_FIELDS), "{status}");
        assert_eq!(status.metadata().get(crate::error::GRPC_KIND_KEY).unwrap(), "invalid_request");
    }

    #[tokio::test]
    async fn one_stream_answers_several_requests_each_with_its_id() {
        let fake = generating(Script::tokens(&["Hel", "lo"]));
        let mut client = client(&fake).await;
        let with_empty = ModelInferRequest {
            parameters: [("triton_enable_empty_final_response".to_owned(), flag(true))].into(),
            ..streamed("b")
        };
        let whole = request("c", vec![texts("text_input", &["Hi"])]);
        let wrong = request("d", vec![texts("prompt", &["Hi"])]);
        let two = ModelInferRequest { id: "e".into(), ..streamed("") };
        let two = ModelInferRequest {
            inputs: vec![texts("text_input", &["x", "y"]), two.inputs[1].clone()],
            ..two
        };
        let requests = futures::stream::iter([streamed("a"), with_empty, whole, wrong, two]);
        let answers = client.model_stream_infer(requests).await.unwrap().into_inner();
        let answers: Vec<ModelStreamInferResponse> = answers.map(Result::unwrap).collect().await;
        let of = |id: &str| -> Vec<ModelStreamInferResponse> {
            let with_id = |one: &&ModelStreamInferResponse| one.infer_response.as_ref().unwrap().id == id;
            answers.iter().filter(with_id).cloned().collect()
        };
        let texts_of = |answers: &[ModelStreamInferResponse]| -> Vec<String> {
            let text = |one: &ModelStreamInferResponse| {
                let outputs = &one.infer_response.as_ref().unwrap().outputs;
                let text = outputs.first()?.contents.as_ref()?.bytes_contents.first()?.clone();
                Some(String::from_utf8(text).unwrap())
            };
            answers.iter().filter_map(text).collect()
        };
        let finals = |answers: &[ModelStreamInferResponse]| -> Vec<bool> {
            let last = |one: &ModelStreamInferResponse| {
                one.infer_response.as_ref().unwrap().parameters["triton_final_response"] == flag(true)
            };
            answers.iter().map(last).collect()
        };
        assert_eq!(texts_of(&of("a")), ["Hel", "lo", ""]);
        assert_eq!(finals(&of("a")), [false, false, true]);
        assert_eq!(texts_of(&of("b")), ["Hel", "lo", ""]);
        assert_eq!(finals(&of("b")), [false, false, false, true]);
        assert_eq!((texts_of(&of("c")), finals(&of("c"))), (vec!["Hello".to_owned()], vec![true]));
        assert!(of("d")[0].error_message.starts_with("prompt: the model has no such input"));
        assert!(of("e")[0].error_message.starts_with("text_input: holds several prompts"));
    }

    #[tokio::test]
    async fn requests_of_one_stream_run_at_the_same_time_and_are_cancelled_with_it() {
        let fake = generating(Script::tokens(&["a"]).then_hangs());
        let mut client = client(&fake).await;
        let (sender, receiver) = mpsc::channel(2);
        let mut answers =
            client.model_stream_infer(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        for (running, id) in (1..).zip(["a", "b"]) {
            sender.send(streamed(id)).await.unwrap();
            let first = answers.message().await.unwrap().unwrap().infer_response.unwrap();
            assert_eq!(first.id, id);
            fake.until_running(running).await;
        }
        // A call is reset when both of its directions are dropped.
        drop((sender, answers));
        fake.until_running(0).await;
    }

    #[tokio::test]
    async fn the_end_of_the_server_ends_a_stream_that_waits_for_requests() {
        let fake = generating(Script::tokens(&["a"]));
        let mut client = client(&fake).await;
        let (sender, receiver) = mpsc::channel(1);
        let mut answers =
            client.model_stream_infer(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        sender.send(streamed("a")).await.unwrap();
        assert!(answers.message().await.unwrap().is_some());
        fake.api().closing.cancel();
        while answers.message().await.unwrap().is_some() {}
    }
}
