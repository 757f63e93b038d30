//! Every fault is counted at the revision that has it, and reported.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tonic::{Code, Status};
use trustformers_gateway::{Settings, start};
use trustformers_proto::control::v1::{Outcome, OutcomeCount, RevisionCounts};
use trustformers_proto::v1::inference_service_client::InferenceServiceClient;
use trustformers_proto::v1::{GenerateRequest, GenerateStreamResponse};

use crate::grpc;
use crate::operator::{Operator, TableBuilder};
use crate::pods::{Pod, full, piece, written};
use crate::retry::resetting;
use crate::{Scene, client, post, scripted, settings, soon, text, until};

/// What a test expects of one series: how attempts ended, and how requests ended for their callers.
#[derive(Debug, Default, PartialEq)]
struct Ends {
    attempts: BTreeMap<Outcome, u64>,
    requests: BTreeMap<Outcome, u64>,
}

impl Ends {
    fn of(counts: &RevisionCounts) -> Self {
        let map = |counts: &[OutcomeCount]| {
            counts.iter().map(|counted| (counted.outcome(), counted.count)).collect()
        };
        Self { attempts: map(&counts.outcomes), requests: map(&counts.requests) }
    }

    fn new(attempts: &[(Outcome, u64)], requests: &[(Outcome, u64)]) -> Self {
        let map = |counts: &[(Outcome, u64)]| counts.iter().copied().collect();
        Self { attempts: map(attempts), requests: map(requests) }
    }
}

/// A request of a row of the table.
#[derive(Debug, Clone, Copy)]
enum Sent {
    /// A prompt over HTTP, whose answer is read to its end.
    Prompt,
    /// The same over gRPC.
    Grpc,
    /// A stream over gRPC, read to its end.
    GrpcStream,
    /// The first kilobytes of a long body.
    SlowUpload,
    /// A prompt whose caller leaves behind the first bytes of the answer.
    Left,
    /// A prompt whose pod dies behind the first bytes of the answer.
    Cut,
}

/// A fault, and where it has to appear.
struct Row {
    route: &'static str,
    pods: Vec<SocketAddr>,
    retries: u32,
    /// The route's time to the first byte; 0: none.
    timeout_ms: u64,
    sent: Sent,
    outcomes: Vec<Outcome>,
    caller_sees: Outcome,
}

fn row(route: &'static str, pod: SocketAddr, outcome: Outcome) -> Row {
    Row {
        route,
        pods: vec![pod],
        retries: 0,
        timeout_ms: 0,
        sent: Sent::Prompt,
        outcomes: vec![outcome],
        caller_sees: outcome,
    }
}

/// A pod whose answer is this stream of events.
async fn streaming(text: &'static str) -> Pod {
    Pod::start(move |_, _| async move {
        let mut answer = full(StatusCode::OK, text);
        answer.headers_mut().insert("content-type", "text/event-stream".parse().unwrap());
        Ok(answer)
    })
    .await
}

/// A pod that begins its answer and never ends it.
async fn endless() -> Pod {
    Pod::start(|_, _| async {
        let (answer, writer) = written();
        tokio::spawn(async move {
            let _sent = writer.send(piece("x")).await;
            writer.closed().await;
        });
        Ok(answer)
    })
    .await
}

async fn silent() -> Pod {
    Pod::start(|_, _| async {
        std::future::pending::<()>().await;
        Ok(full(StatusCode::OK, "never"))
    })
    .await
}

async fn send(scene: &Scene, row: &Row, cut: &Pod) {
    match row.sent {
        Sent::Prompt => {
            scene.answer(row.route).await;
        }
        Sent::Grpc => {
            let request =
                GenerateRequest { prompt: "p".into(), model: row.route.into(), ..Default::default() };
            let mut caller = InferenceServiceClient::connect(scene.grpc()).await.unwrap();
            let _answer_or_status = soon("a status", caller.generate(request)).await;
        }
        Sent::GrpcStream => {
            let request =
                GenerateRequest { prompt: "p".into(), model: row.route.into(), ..Default::default() };
            let mut caller = InferenceServiceClient::connect(scene.grpc()).await.unwrap();
            let mut answer = soon("a head", caller.generate_stream(request)).await.unwrap().into_inner();
            while let Ok(Some(_message)) = soon("a message or the end", answer.message()).await {}
        }
        Sent::SlowUpload => {
            let mut stream = TcpStream::connect(scene.http()).await.unwrap();
            let head = "POST /v1/generate HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n";
            let begin = format!(r#"{{"model": "{}", "prompt": "{}"#, row.route, "x".repeat(300 << 10));
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(begin.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            soon("an answer", stream.read_exact(&mut answer)).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 408");
        }
        Sent::Left | Sent::Cut => {
            let mut answer = scene.request(row.route).await;
            soon("the first bytes", answer.frame()).await.unwrap().unwrap();
            if matches!(row.sent, Sent::Cut) {
                cut.kill().await;
                assert!(soon("the break", answer.frame()).await.unwrap().is_err());
            }
        }
    }
}

#[tokio::test]
async fn each_fault_appears_in_exactly_its_series() {
    let declining = |status| Pod::declining(StatusCode::from_u16(status).unwrap());
    let whole = Pod::named("whole").await;
    let (reset, cut) = (resetting().await, endless().await);
    let events = streaming("data: {}\n\nevent: error\ndata: {}\n\n").await;
    let (silent, endless) = (silent().await, endless().await);
    let (bad, wrong, ending) = (declining(500).await, declining(400).await, declining(503).await);
    let (lacking, busy) = (declining(501).await, declining(429).await);
    let absent = Pod::absent().await;
    let (internal, _) = grpc::pod(Some(Code::Internal)).await;
    let (unimplemented, _) = grpc::pod(Some(Code::Unimplemented)).await;
    let (failing, pieces) = grpc::pod(None).await;
    let late = tokio::spawn(async move {
        pieces.send(Ok(GenerateStreamResponse::default())).await.unwrap();
        pieces.send(Err(Status::internal("behind a message"))).await.unwrap();
    });
    let rows = [
        row("whole", whole.address, Outcome::Ok),
        row("refused", absent, Outcome::ConnectFailed),
        row("reset-before", reset.address, Outcome::ResetBefore),
        Row { sent: Sent::Cut, ..row("reset-in-stream", cut.address, Outcome::ResetInStream) },
        row("error-in-events", events.address, Outcome::PodError),
        row("error-500", bad.address, Outcome::PodError),
        row("wrong-request", wrong.address, Outcome::CallerError),
        row("not-served", lacking.address, Outcome::CallerError),
        row("ending", ending.address, Outcome::Unavailable),
        Row { timeout_ms: 300, ..row("silent", silent.address, Outcome::Timeout) },
        Row { sent: Sent::Grpc, ..row("trailers-only", internal, Outcome::PodError) },
        Row { sent: Sent::GrpcStream, ..row("status-behind-messages", failing, Outcome::PodError) },
        Row { sent: Sent::Grpc, ..row("unknown-method", unimplemented, Outcome::CallerError) },
        Row {
            sent: Sent::SlowUpload,
            timeout_ms: 300,
            ..row("slow-upload", silent.address, Outcome::CallerError)
        },
        Row { sent: Sent::Left, ..row("left", endless.address, Outcome::Cancelled) },
        Row {
            pods: vec![busy.address, absent],
            retries: 1,
            outcomes: vec![Outcome::Overloaded, Outcome::ConnectFailed],
            ..row("full-and-dead", absent, Outcome::Overloaded)
        },
    ];
    let table = rows.iter().fold(TableBuilder::new(1, 1), |table, row| {
        table.route(row.route).policy(row.timeout_ms, row.retries).backend("r1", 1, &row.pods)
    });
    let scene = Scene::with_table(table).await;
    for row in &rows {
        send(&scene, row, &cut).await;
    }
    late.await.unwrap();
    let expected: BTreeMap<String, Ends> = rows
        .iter()
        .map(|row| {
            let attempts: Vec<_> = row.outcomes.iter().map(|outcome| (*outcome, 1)).collect();
            (format!("default/{}", row.route), Ends::new(&attempts, &[(row.caller_sees, 1)]))
        })
        .collect();
    let found = || {
        let counts = scene.operator.counts();
        counts.into_iter().map(|((route, _), counts)| (route, Ends::of(&counts))).collect::<BTreeMap<_, _>>()
    };
    let ends = || found().values().map(|ends| ends.attempts.values().sum::<u64>()).sum::<u64>();
    until("every attempt to be reported", || async { ends() as usize > rows.len() }).await;
    assert_eq!(found(), expected);
    for ((route, _), counts) in scene.operator.counts() {
        let ended: u64 = counts.outcomes.iter().map(|counted| counted.count).sum();
        assert_eq!(counts.attempts, ended, "{route}");
        let line = format!(r#"trustformers_gateway_in_flight{{revision="r1",route="{route}"}}"#);
        assert!(scene.metric(&line).await.abs() < 1e-9, "{route}");
    }
}

#[tokio::test]
async fn a_crashing_candidate_shows_its_own_errors_and_callers_see_none() {
    let (good, crashing) = (Pod::named("good").await, resetting().await);
    let table = TableBuilder::new(1, 1).route("a").backend("stable", 50, &[good.address]).backend(
        "candidate",
        50,
        &[crashing.address],
    );
    let scene = Scene::with_table(table).await;
    for _ in 0..20 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "good".to_owned()));
    }
    assert_eq!(crashing.requests(), 10);
    let of = |revision: &str| {
        let counts = scene.operator.counts();
        counts.get(&("default/a".to_owned(), revision.to_owned())).map(Ends::of).unwrap_or_default()
    };
    let stable = Ends::new(&[(Outcome::Ok, 20)], &[(Outcome::Ok, 20)]);
    until("the report", || async { of("stable") == stable }).await;
    assert_eq!(of("candidate"), Ends::new(&[(Outcome::ResetBefore, 10)], &[]));
}

#[tokio::test]
async fn times_and_tokens_are_reported_and_all_of_it_again_to_another_operator() {
    let pod = scripted::start(&["default/words", "words"], "generate").await;
    let table =
        |counter| TableBuilder::new(1, counter).route("words").task("generate").backend("r1", 1, &[pod]);
    let mut scene = Scene::with_table(table(1)).await;
    for path in ["/v1/generate/stream", "/v1/generate"] {
        let request = post(scene.http(), path, r#"{"model": "words", "prompt": "Hi"}"#);
        let answer = soon("an answer", scene.client.request(request)).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        soon("its end", answer.into_body().collect()).await.unwrap();
    }
    let key = ("default/words".to_owned(), "r1".to_owned());
    let answered =
        |counts: &RevisionCounts| Ends::of(counts) == Ends::new(&[(Outcome::Ok, 2)], &[(Outcome::Ok, 2)]);
    until("the report", || async { scene.operator.counts().get(&key).is_some_and(answered) }).await;
    let counts = scene.operator.counts().remove(&key).unwrap();
    assert_eq!((counts.prompt_tokens, counts.completion_tokens), (6, 4));
    let observed = |histogram: &Option<trustformers_proto::control::v1::LatencyHistogram>| {
        histogram.as_ref().map_or(0, |histogram| histogram.counts.iter().sum::<u64>())
    };
    // The answer that is no stream has no first token of its own.
    assert_eq!((observed(&counts.first_token), observed(&counts.answer)), (1, 2));
    let tokens =
        r#"trustformers_gateway_tokens_total{kind="completion",revision="r1",route="default/words"}"#;
    assert!((scene.metric(tokens).await - 4.0).abs() < 1e-9);

    // The revision has left the table when another operator begins, and its sums are there all the same.
    scene.publish(TableBuilder::new(1, 2)).await;
    scene.operator.stop().await;
    let before = scene.operator.reports();
    scene.operator.restart().await;
    let again = scene.operator.report(before, |report| !report.counts.is_empty()).await;
    assert_eq!(again.counts, [counts]);
}

/// The attempts of a route that ended well, by the last report of each process.
fn answered(operator: &Operator, route: &str) -> u64 {
    let ok = |counts: &RevisionCounts| {
        let outcomes = counts.outcomes.iter().filter(|counted| counted.outcome() == Outcome::Ok);
        outcomes.map(|counted| counted.count).sum::<u64>()
    };
    let of_process = operator.counts_by_process();
    of_process.iter().filter(|((_, counted), _)| counted == route).map(|(_, counts)| ok(counts)).sum()
}

#[tokio::test]
async fn no_count_is_lost_or_doubled_by_a_table_an_operator_or_a_restart() {
    let (writers, mut streams) = mpsc::channel(1);
    let pod = Pod::start(move |head, _| {
        let writers = writers.clone();
        async move {
            if head.uri.path() != "/v1/generate/stream" {
                return Ok(full(StatusCode::OK, "one"));
            }
            let (answer, writer) = written();
            writers.send(writer).await?;
            Ok(answer)
        }
    })
    .await;
    let table = |counter| TableBuilder::new(1, counter).route("a").backend("r1", 1, &[pod.address]);
    let operator = Operator::start().await;
    let state = tempfile::tempdir().unwrap();
    // Long enough for the stream below, and of no effect otherwise.
    let slow = |operator: &Operator| Settings {
        drain_timeout: Duration::from_secs(60),
        ..settings(operator.address(), state.path(), &[])
    };
    let gateway = start(slow(&operator)).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut scene = Scene { gateway, operator, state: folder, client: client(true) };
    scene.publish(table(1)).await;
    let send = async |scene: &Scene, count: usize| {
        for _ in 0..count {
            assert_eq!(scene.answer("a").await.0, StatusCode::OK);
        }
    };
    send(&scene, 3).await;
    // Another table, then no operator, then another operator.
    scene.publish(table(2)).await;
    send(&scene, 2).await;
    scene.operator.stop().await;
    send(&scene, 2).await;
    scene.operator.restart().await;
    until("the sums to come again", || async { answered(&scene.operator, "default/a") == 7 }).await;

    // The process ends while a stream runs, which ends behind everything else.
    let stream = post(scene.http(), "/v1/generate/stream", r#"{"model": "a"}"#);
    let stream = soon("the head of an answer", scene.client.request(stream)).await.unwrap();
    let writer = soon("the stream", streams.recv()).await.unwrap();
    let address = scene.http();
    let Scene { gateway, operator, state: folder, client } = scene;
    let ending = tokio::spawn(gateway.finish());
    until("the listener to close", || async { TcpStream::connect(address).await.is_err() }).await;
    writer.send(piece("the rest")).await.unwrap();
    drop(writer);
    assert_eq!(text(stream).await.1, "the rest");
    drop(client);
    assert_eq!(soon("the gateway to end", ending).await.unwrap(), 0);
    until("the last report", || async { answered(&operator, "default/a") == 8 }).await;

    // Another process of the same gateway counts from nothing.
    let gateway = start(slow(&operator)).await.unwrap();
    let scene = Scene { gateway, operator, state: folder, client: crate::client(false) };
    send(&scene, 2).await;
    until("the sum of both processes", || async { answered(&scene.operator, "default/a") == 10 }).await;
}
