//! `InferenceService.Session`: several requests at once over one call.

use std::sync::Arc;

use axum::http::HeaderMap;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use prost::Message;
use tokio::time::Instant;
use tonic::{Request, Status, Streaming};
use trustformers_proto::v1;
use v1::session_request::Action;
use v1::session_response::Event as Answered;

use super::message;
use crate::echo::echo;
use crate::error::GRPC_KIND_KEY;
use crate::fields::{Asked, GRPC_DEFAULTS, Generation};
use crate::inference::Inference;
use crate::limits::CallerLimits;
use crate::multiplex::{Identified, Multiplexer, RequestReply, server_is_ending};
use crate::{Api, ApiError};

/// The answers of a call.
pub(super) type SessionAnswers = BoxStream<'static, Result<v1::SessionResponse, Status>>;

/// Answers a call until the caller has ended its side and every request is answered.
pub(super) fn answer(api: Api, request: Request<Streaming<v1::SessionRequest>>) -> SessionAnswers {
    let limits = request.extensions().get::<CallerLimits>().cloned().unwrap_or_default();
    let (metadata, _, incoming) = request.into_parts();
    let session = Session {
        api,
        incoming: Some(incoming),
        metadata: metadata.into_headers(),
        running: Multiplexer::new("request_id", limits),
    };
    stream::unfold(session, |mut session| async move {
        let next = session.next().await?;
        Some((next, session))
    })
    .boxed()
}

struct Session {
    api: Api,
    /// None when the caller has ended its side.
    incoming: Option<Streaming<v1::SessionRequest>>,
    metadata: HeaderMap,
    running: Multiplexer<Answered>,
}

/// What happens next in a call.
enum Step {
    Received(Result<Option<v1::SessionRequest>, Status>),
    Replied(Identified<Answered>),
    Closing,
}

impl Session {
    async fn next(&mut self) -> Option<Result<v1::SessionResponse, Status>> {
        loop {
            let closing = self.api.closing.is_cancelled();
            if self.running.is_idle() && closing {
                return self.incoming.take().map(|_| Err(server_is_ending().into()));
            }
            if self.running.is_idle() && self.incoming.is_none() {
                return None;
            }
            match self.step(closing).await {
                Step::Received(Ok(Some(request))) => {
                    if let Some(response) = self.receive(request) {
                        return Some(Ok(response));
                    }
                }
                Step::Received(Ok(None)) => self.incoming = None,
                Step::Received(Err(status)) => {
                    self.incoming = None;
                    self.running.clear();
                    return Some(Err(unreadable(status)));
                }
                Step::Replied(Identified { id, reply }) => return Some(Ok(response(id, reply))),
                Step::Closing => {}
            }
        }
    }

    async fn step(&mut self, closing: bool) -> Step {
        let Self { api, incoming, running, .. } = self;
        let receive = async {
            match incoming {
                Some(incoming) => incoming.message().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            received = receive => Step::Received(received),
            replied = running.next() => Step::Replied(replied),
            () = api.closing.cancelled(), if !closing => Step::Closing,
        }
    }

    /// Takes a message; gives the reply that it has at once.
    fn receive(&mut self, request: v1::SessionRequest) -> Option<v1::SessionResponse> {
        let bytes = request.encoded_len();
        let v1::SessionRequest { request_id, action } = request;
        let reply = match action {
            Some(Action::Generate(asked)) => match self.start(&request_id, bytes, asked) {
                Ok(()) => return None,
                Err(error) => Answered::failed(error),
            },
            // A request may end while its cancellation is on the way.
            Some(Action::Cancel(_)) if !self.running.cancel(&request_id) => return None,
            Some(Action::Cancel(_)) => Answered::Answer(v1::GenerateStreamResponse {
                finish_reason: v1::FinishReason::Cancelled as i32,
                ..Default::default()
            }),
            None => {
                let message = "is none that this server knows: give generate or cancel";
                Answered::failed(ApiError::field("action", message))
            }
        };
        Some(response(echo(&request_id).into_owned(), reply))
    }

    fn start(&mut self, id: &str, bytes: usize, asked: v1::GenerateRequest) -> Result<(), ApiError> {
        if self.api.closing.is_cancelled() {
            return Err(server_is_ending());
        }
        let generation = Asked::try_from(asked)?.with_headers(&self.metadata)?.check(&GRPC_DEFAULTS)?;
        self.running.start(id, bytes, replies(self.api.inference.clone(), generation))
    }
}

fn replies(
    inference: Arc<dyn Inference>,
    generation: Generation,
) -> impl Stream<Item = Answered> + Send + 'static {
    let started = Instant::now();
    let answered = async move {
        let mut answer = match inference.generate(generation).await {
            Ok(answer) => answer,
            Err(error) => return stream::iter([Answered::failed(error)]).boxed(),
        };
        let events = std::mem::replace(&mut answer.events, stream::empty().boxed());
        let replies = events.map(move |event| match event {
            Ok(event) => Answered::Answer(message(event, &answer, started)),
            Err(error) => Answered::failed(error),
        });
        replies.boxed()
    };
    stream::once(answered).flatten()
}

impl RequestReply for Answered {
    fn is_last(&self) -> bool {
        match self {
            Self::Answer(answer) => answer.finish_reason() != v1::FinishReason::Unspecified,
            Self::Error(_) => true,
        }
    }

    fn failed(error: ApiError) -> Self {
        Self::Error(v1::SessionError {
            code: error.code() as i32,
            kind: error.kind().to_owned(),
            message: error.message(),
            retry_after: error.retry_after_s(),
        })
    }
}

fn response(request_id: String, event: Answered) -> v1::SessionResponse {
    v1::SessionResponse { request_id, event: Some(event) }
}

/// The end of a call whose messages cannot be read.
fn unreadable(status: Status) -> Status {
    let kind_is_known = status.metadata().get(GRPC_KIND_KEY).is_some();
    if kind_is_known || status.code() != tonic::Code::Internal {
        return status;
    }
    ApiError::InvalidRequest { field: None, message: status.message().to_owned() }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::grpc::tests::{prompt, start};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;
    use tonic::Code;
    use v1::inference_service_client::InferenceServiceClient;

    struct Call {
        requests: mpsc::Sender<v1::SessionRequest>,
        answers: Streaming<v1::SessionResponse>,
    }

    impl Call {
        async fn to(fake: &Fake) -> Self {
            let (channel, ..) = start(fake).await;
            let (requests, sent) = mpsc::channel(8);
            let mut request = Request::new(ReceiverStream::new(sent));
            request.metadata_mut().insert("x-trustformers-priority", "low".parse().unwrap());
            let answers = InferenceServiceClient::new(channel).session(request).await.unwrap().into_inner();
            Self { requests, answers }
        }

        async fn send(&self, id: &str, action: Action) {
            let request = v1::SessionRequest { request_id: id.into(), action: Some(action) };
            self.requests.send(request).await.unwrap();
        }

        async fn generate(&self, id: &str, text: &str) {
            self.send(id, Action::Generate(prompt(text))).await;
        }

        async fn cancel(&self, id: &str) {
            self.send(id, Action::Cancel(v1::session_request::Cancel {})).await;
        }

        async fn next(&mut self) -> (String, Answered) {
            let response = self.answers.message().await.unwrap().unwrap();
            (response.request_id, response.event.unwrap())
        }

        async fn error(&mut self) -> (String, v1::SessionError) {
            match self.next().await {
                (id, Answered::Error(error)) => (id, error),
                (id, other) => panic!("{id}: {other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn several_requests_are_answered_over_one_call() {
        let fake = Fake::with(Script::tokens(&["a", "b"]));
        let mut call = Call::to(&fake).await;
        call.generate("1", "x").await;
        call.generate("2", "y").await;
        let mut texts = std::collections::BTreeMap::<String, String>::new();
        let mut ended = 0;
        while ended < 2 {
            let (id, event) = call.next().await;
            let Answered::Answer(answer) = event else { panic!("{event:?}") };
            texts.entry(id).or_default().push_str(&answer.text);
            if answer.finish_reason() == v1::FinishReason::Stop {
                assert_eq!((answer.usage.unwrap().total_tokens, answer.revision.as_str()), (5, "r1"));
                ended += 1;
            }
        }
        assert_eq!(texts, [("1".to_owned(), "ab".to_owned()), ("2".to_owned(), "ab".to_owned())].into());
        assert_eq!(fake.last_request().priority, crate::Priority::Low);
        drop(call.requests);
        assert!(call.answers.message().await.unwrap().is_none(), "the call ends when both sides have ended");
    }

    #[tokio::test]
    async fn a_request_is_cancelled_alone_and_all_with_their_call() {
        let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
        let mut call = Call::to(&fake).await;
        for id in ["1", "2", "3"] {
            call.generate(id, "x").await;
            assert_eq!(call.next().await.0, id);
        }
        call.cancel("2").await;
        let (id, event) = call.next().await;
        let Answered::Answer(answer) = event else { panic!("{event:?}") };
        assert_eq!((id.as_str(), answer.finish_reason()), ("2", v1::FinishReason::Cancelled));
        fake.until_running(2).await;
        call.cancel("unknown").await;
        call.generate("2", "again").await;
        assert_eq!(
            call.next().await.0,
            "2",
            "a cancellation of nothing has no answer, and an id is free again"
        );
        drop(call);
        fake.until_running(0).await;
    }

    #[tokio::test]
    async fn errors_name_their_request_and_the_call_goes_on() {
        let overloaded = ApiError::Overloaded { message: "full".into(), retry_after_s: 3 };
        let mut call = Call::to(&Fake::with(Script::refused(overloaded))).await;
        call.generate("1", "x").await;
        let (id, error) = call.error().await;
        assert_eq!((id.as_str(), error.kind.as_str(), error.retry_after), ("1", "overloaded", Some(3)));
        assert_eq!(error.code, Code::ResourceExhausted as i32);
        call.generate("2", "").await;
        assert_eq!(call.error().await.1.kind, "invalid_request");
        call.generate("", "x").await;
        assert!(call.error().await.1.message.starts_with("request_id: has 0 bytes"));
        let nothing = v1::SessionRequest { request_id: "3".into(), action: None };
        call.requests.send(nothing).await.unwrap();
        let (id, error) = call.error().await;
        assert!(id == "3" && error.message.starts_with("action: "), "{error:?}");
    }

    #[tokio::test]
    async fn an_ending_server_finishes_what_runs_and_takes_nothing_new() {
        let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
        let mut call = Call::to(&fake).await;
        call.generate("1", "x").await;
        call.next().await;
        fake.api().closing.cancel();
        call.generate("2", "x").await;
        assert_eq!(call.error().await.1.kind, "unavailable");
        call.cancel("1").await;
        call.next().await;
        let status = call.answers.message().await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
    }
}
