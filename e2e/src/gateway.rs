//! The client's side: requests through the gateway by HTTP, SSE and gRPC, at the nodes' own addresses.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Response, body::Incoming};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;
use tonic::transport::Channel;
use trustformers_proto::v1::{
    Classification, ClassifyRequest, EmbedRequest, FinishReason, GenerateRequest, GenerateStreamResponse,
    inference_service_client::InferenceServiceClient,
};

use crate::{
    cluster::is_test_address,
    request::{Answer, Failure, Request},
    sse::{Event, Parser, Piece},
};

/// The limit on every request of a scenario.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// The gateway's ports on one node.
#[derive(Debug, Clone)]
struct Endpoint {
    http: String,
    grpc_address: String,
    grpc: Channel,
}

/// A client of the gateway outside the cluster. Clones share their connections.
#[derive(Clone)]
pub struct Gateway {
    endpoints: Arc<Vec<Endpoint>>,
    next: Arc<AtomicUsize>,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// What the head of an answer names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedAnswer {
    /// The variant, where the route has an A/B test.
    pub variant: Option<String>,
    /// The id with which the answer can be scored.
    pub request_id: String,
    /// What lets any gateway count the score.
    pub token: Option<String>,
}

#[derive(Deserialize)]
struct GenerateAnswer {
    text: String,
    tokens: Vec<u32>,
    finish_reason: String,
}

impl Gateway {
    /// A gateway that listens on these ports at each of these addresses, which requests use in turn.
    ///
    /// # Errors
    /// When an address is outside the test cluster's network: scenarios send nothing there.
    pub fn new(addresses: &[String], http_port: u16, grpc_port: u16) -> Result<Self> {
        let mut endpoints = Vec::new();
        for address in addresses {
            ensure!(is_test_address(address), "{address} is outside the test cluster's network");
            let grpc = tonic::transport::Endpoint::from_shared(format!("http://{address}:{grpc_port}"))?
                .connect_timeout(Duration::from_secs(3))
                .timeout(REQUEST_LIMIT)
                .connect_lazy();
            let http = format!("http://{address}:{http_port}");
            endpoints.push(Endpoint { http, grpc_address: format!("{address}:{grpc_port}"), grpc });
        }
        ensure!(!endpoints.is_empty(), "no address to reach the gateway at");
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(Duration::from_secs(3)));
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { endpoints: Arc::new(endpoints), next: Arc::new(AtomicUsize::new(0)), client })
    }

    /// The address of the first node's HTTP endpoint, for `curl` and for messages.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.endpoints[0].http
    }

    /// The address of the first node's gRPC endpoint.
    #[must_use]
    pub fn grpc_address(&self) -> &str {
        &self.endpoints[0].grpc_address
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoints[self.next.fetch_add(1, Ordering::Relaxed) % self.endpoints.len()]
    }

    /// `GET path`: the status and the body's text.
    ///
    /// # Errors
    /// When no answer came.
    pub async fn get(&self, path: &str) -> Result<(u16, String)> {
        let request = hyper::Request::get(format!("{}{path}", self.endpoint().http)).body(Full::default())?;
        let answer = async {
            let response = self.client.request(request).await?;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await?.to_bytes();
            anyhow::Ok((status, String::from_utf8_lossy(&body).into_owned()))
        };
        tokio::time::timeout(REQUEST_LIMIT, answer)
            .await
            .with_context(|| format!("no answer to GET {path}"))?
    }

    async fn post(&self, path: &str, request: &Request) -> Result<Response<Incoming>, Failure> {
        let body = serde_json::json!({
            "model": request.model, "prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0,
        });
        self.post_json(path, &body).await
    }

    async fn post_json(&self, path: &str, body: &serde_json::Value) -> Result<Response<Incoming>, Failure> {
        let request = hyper::Request::builder()
            .method(Method::POST)
            .uri(format!("{}{path}", self.endpoint().http))
            .header("content-type", "application/json")
            .body(Full::from(body.to_string()))
            .map_err(|error| Failure::connection(&error))?;
        let response =
            self.client.request(request).await.map_err(|error| Failure::connection(&error_chain(&error)))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(|error| Failure::connection(&error))?;
        Err(Failure::Refused { status, message: String::from_utf8_lossy(&body.to_bytes()).into_owned() })
    }

    /// Vectors of `texts` by `POST /v1/embeddings`, and the answer as it came.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn embeddings(
        &self,
        model: Option<&str>,
        texts: &[&str],
    ) -> Result<(Vec<Vec<f64>>, serde_json::Value), Failure> {
        let body = match model {
            Some(model) => serde_json::json!({"model": model, "input": texts}),
            None => serde_json::json!({"input": texts}),
        };
        let answer = limited(async {
            let response = self.post_json("/v1/embeddings", &body).await?;
            let body =
                response.into_body().collect().await.map_err(|error| Failure::connection(&error))?.to_bytes();
            serde_json::from_slice::<serde_json::Value>(&body).map_err(|error| Failure::connection(&error))
        })
        .await?;
        let data = answer["data"].as_array().map_or(&[][..], Vec::as_slice);
        let vector = |one: &serde_json::Value| serde_json::from_value(one["embedding"].clone());
        let vectors =
            data.iter().map(vector).collect::<Result<_, _>>().map_err(|error| Failure::connection(&error))?;
        Ok((vectors, answer))
    }

    /// Asks for the vector of a text as this user. Returns the variant that the answer names, where the route
    /// has an A/B test.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn embed_as(&self, user: &str, model: &str, text: &str) -> Result<Option<String>, Failure> {
        let body = serde_json::json!({"model": model, "input": [text]});
        Ok(self.post_as(user, "/v1/embeddings", &body).await?.variant)
    }

    /// `POST path` as this user.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn post_as(
        &self,
        user: &str,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<NamedAnswer, Failure> {
        let request = hyper::Request::builder()
            .method(Method::POST)
            .uri(format!("{}{path}", self.endpoint().http))
            .header("content-type", "application/json")
            .header("x-user-id", user)
            .body(Full::from(body.to_string()))
            .map_err(|error| Failure::connection(&error))?;
        limited(async {
            let response = self.client.request(request).await;
            let response = response.map_err(|error| Failure::connection(&error_chain(&error)))?;
            let status = response.status();
            let header = |name: &str| {
                response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
            };
            let (variant, request_id) = (header("x-trustformers-variant"), header("x-request-id"));
            let token = header("x-trustformers-feedback");
            let body = response.into_body().collect().await.map_err(|error| Failure::connection(&error))?;
            if status.is_success() {
                return Ok(NamedAnswer { variant, request_id: request_id.unwrap_or_default(), token });
            }
            let message = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            Err(Failure::Refused { status: status.as_u16(), message })
        })
        .await
    }

    /// Vectors of `texts` by the gRPC `Embed`.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn grpc_embeddings(&self, model: &str, texts: &[&str]) -> Result<Vec<Vec<f32>>, Failure> {
        let client = InferenceServiceClient::new(self.endpoint().grpc.clone());
        let input = texts.iter().map(ToString::to_string).collect();
        let request = EmbedRequest { input, model: model.to_owned(), ..EmbedRequest::default() };
        let call = || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.embed(request).await }
        };
        let answer = limited(async { sent_again(call).await.map_err(|it| refused(&it)) }).await?;
        Ok(answer.into_inner().data.into_iter().map(|one| one.values).collect())
    }

    /// The answer of `POST /v1/classify` for `texts`.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn classify(&self, model: &str, texts: &[&str]) -> Result<serde_json::Value, Failure> {
        let body = serde_json::json!({"model": model, "input": texts});
        limited(async {
            let response = self.post_json("/v1/classify", &body).await?;
            let body =
                response.into_body().collect().await.map_err(|error| Failure::connection(&error))?.to_bytes();
            serde_json::from_slice(&body).map_err(|error| Failure::connection(&error))
        })
        .await
    }

    /// The labels of each of `texts` with their scores, by the gRPC `Classify`.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn grpc_classify(&self, model: &str, texts: &[&str]) -> Result<Vec<Classification>, Failure> {
        let mut client = InferenceServiceClient::new(self.endpoint().grpc.clone());
        let input = texts.iter().map(ToString::to_string).collect();
        let request = ClassifyRequest { input, model: model.to_owned(), ..ClassifyRequest::default() };
        let answer = limited(async { client.classify(request).await.map_err(|it| refused(&it)) }).await?;
        Ok(answer.into_inner().results)
    }

    /// Sends `POST /v1/generate`.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn http(&self, request: &Request) -> Result<Answer, Failure> {
        let started = Instant::now();
        let answer = async {
            let response = self.post("/v1/generate", request).await?;
            let body =
                response.into_body().collect().await.map_err(|error| Failure::connection(&error))?.to_bytes();
            serde_json::from_slice::<GenerateAnswer>(&body).map_err(|error| Failure::connection(&error))
        };
        let answer = limited(answer).await?;
        Ok(Answer {
            text: answer.text,
            tokens: answer.tokens,
            finish_reason: answer.finish_reason,
            first_token: started.elapsed(),
        })
    }

    /// Sends `POST /v1/generate/stream`; `on_token` is called for each token as it arrives.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn sse(&self, request: &Request, on_token: impl FnMut(usize)) -> Result<Answer, Failure> {
        let mut gathered = Gathered::new(on_token);
        limited(async {
            let mut body = self.post("/v1/generate/stream", request).await?.into_body();
            let mut parser = Parser::default();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| gathered.broken(&error_chain(&error)))?;
                for event in parser.take(frame.data_ref().map_or(&[][..], |data| &data[..])) {
                    match event {
                        Event::Piece(Piece { text, token, finish_reason }) => {
                            gathered.take(&text, token, finish_reason);
                        }
                        Event::Done => return gathered.whole(),
                        Event::Malformed(text) => return Err(gathered.broken(&text)),
                    }
                }
            }
            Err(gathered.broken(&"the stream ended without [DONE]"))
        })
        .await
    }

    /// Asks by the unary gRPC `Generate`.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn grpc(&self, request: &Request) -> Result<Answer, Failure> {
        let started = Instant::now();
        let client = InferenceServiceClient::new(self.endpoint().grpc.clone());
        let call = || {
            let mut client = client.clone();
            async move { client.generate(generate_request(request)).await }
        };
        let answer = limited(async { sent_again(call).await.map_err(|it| refused(&it)) }).await?;
        let answer = answer.into_inner();
        Ok(Answer {
            finish_reason: reason(answer.finish_reason).unwrap_or_default(),
            text: answer.text,
            tokens: answer.tokens,
            first_token: started.elapsed(),
        })
    }

    /// Calls the gRPC stream `GenerateStream`; `on_token` is called for each token as it arrives.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn grpc_stream(
        &self,
        request: &Request,
        on_token: impl FnMut(usize),
    ) -> Result<Answer, Failure> {
        let mut gathered = Gathered::new(on_token);
        limited(async {
            let client = InferenceServiceClient::new(self.endpoint().grpc.clone());
            let call = || {
                let mut client = client.clone();
                async move { client.generate_stream(generate_request(request)).await }
            };
            let mut stream = sent_again(call).await.map_err(|it| refused(&it))?.into_inner();
            loop {
                match stream.message().await {
                    Ok(Some(GenerateStreamResponse { text, token, finish_reason, .. })) => {
                        let reason = reason(finish_reason);
                        gathered.take(&text, reason.is_none().then_some(token), reason);
                    }
                    Ok(None) => return gathered.whole(),
                    Err(status) => return Err(gathered.broken(&status)),
                }
            }
        })
        .await
    }
}

/// The part of a stream that has arrived.
struct Gathered<F> {
    answer: Answer,
    started: Instant,
    on_token: F,
}

impl<F: FnMut(usize)> Gathered<F> {
    fn new(on_token: F) -> Self {
        let answer = Answer {
            text: String::new(),
            tokens: Vec::new(),
            finish_reason: String::new(),
            first_token: Duration::ZERO,
        };
        Self { answer, started: Instant::now(), on_token }
    }

    fn take(&mut self, text: &str, token: Option<u32>, finish_reason: Option<String>) {
        self.answer.text.push_str(text);
        self.answer.finish_reason = finish_reason.unwrap_or_default();
        if let Some(token) = token {
            if self.answer.tokens.is_empty() {
                self.answer.first_token = self.started.elapsed();
            }
            self.answer.tokens.push(token);
            (self.on_token)(self.answer.tokens.len());
        }
    }

    fn whole(&self) -> Result<Answer, Failure> {
        if self.answer.finish_reason.is_empty() {
            return Err(self.broken(&"the stream ended without a finish reason"));
        }
        Ok(self.answer.clone())
    }

    fn broken(&self, message: &dyn std::fmt::Display) -> Failure {
        Failure::Broken { tokens: self.answer.tokens.clone(), message: message.to_string() }
    }
}

async fn limited<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let ended = tokio::time::timeout(REQUEST_LIMIT, work).await;
    ended.unwrap_or_else(|_| Err(Failure::connection(&format!("no end within {REQUEST_LIMIT:?}"))))
}

/// A call that is made once more where its connection was closed before the request left this process, or
/// the server declares that it did not process it. Clients of gRPC do that by themselves (transparent
/// retries), and the HTTP client here does the former; tonic does neither.
async fn sent_again<T, F>(call: impl Fn() -> F) -> Result<T, tonic::Status>
where
    F: Future<Output = Result<T, tonic::Status>>,
{
    match call().await {
        Err(status) if was_not_sent(&status) => call().await,
        ended => ended,
    }
}

fn was_not_sent(status: &tonic::Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            // The stream was refused, or is behind the last one that GOAWAY names.
            let went_away = error.is_go_away() && error.is_remote();
            return error.reason() == Some(h2::Reason::REFUSED_STREAM)
                || (went_away && error.reason() == Some(h2::Reason::NO_ERROR));
        }
        cause = error.source();
    }
    false
}

fn generate_request(request: &Request) -> GenerateRequest {
    GenerateRequest {
        model: request.model.clone(),
        prompt: request.prompt.clone(),
        max_tokens: request.max_tokens,
        ..GenerateRequest::default()
    }
}

fn reason(wire: i32) -> Option<String> {
    match FinishReason::try_from(wire) {
        Ok(FinishReason::Stop) => Some("stop".to_owned()),
        Ok(FinishReason::Length) => Some("length".to_owned()),
        // Only within a session, which this client does not use.
        Ok(FinishReason::Cancelled) => Some("cancelled".to_owned()),
        Ok(FinishReason::Unspecified) => None,
        Err(_) => Some(format!("unknown finish reason {wire}")),
    }
}

fn refused(status: &tonic::Status) -> Failure {
    let http = match status.code() {
        tonic::Code::InvalidArgument => 400,
        tonic::Code::NotFound => 404,
        tonic::Code::ResourceExhausted => 429,
        tonic::Code::Unavailable => 503,
        tonic::Code::DeadlineExceeded => 504,
        _ => 500,
    };
    Failure::Refused { status: http, message: status.to_string() }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The status of a call whose stream is reset for this reason. The next streams get NOT_FOUND.
    async fn status_behind(reason: h2::Reason) -> Option<u16> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(socket).await.unwrap();
            let (_request, mut refused) = connection.accept().await.unwrap().unwrap();
            refused.send_reset(reason);
            // Until the client has gone.
            while let Some(Ok((_request, mut stream))) = connection.accept().await {
                let head = Response::builder().header("content-type", "application/grpc");
                let head = head.header("grpc-status", "5").body(()).unwrap();
                stream.send_response(head, true).unwrap();
            }
        });
        let gateway = Gateway::new(&["127.0.0.1".to_owned()], port, port).unwrap();
        let failure = gateway.grpc_embeddings("m", &["a"]).await.unwrap_err();
        drop(gateway);
        server.await.unwrap();
        failure.status()
    }

    #[tokio::test]
    async fn only_a_call_that_the_server_did_not_process_is_made_again() {
        assert_eq!(status_behind(h2::Reason::REFUSED_STREAM).await, Some(404));
        assert_eq!(status_behind(h2::Reason::INTERNAL_ERROR).await, Some(500));
    }
}
