//! Answers in pieces, and callers that disconnect.

use http_body_util::BodyExt;
use tokio::sync::mpsc;

use crate::operator::TableBuilder;
use crate::pods::{Pod, Writer, piece, written};
use crate::{Scene, client, post, soon, text, until};

/// A pod whose answers a test writes; the writer of each request comes through the channel.
async fn writing_pod() -> (Pod, mpsc::Receiver<Writer>) {
    let (writers, answers) = mpsc::channel(8);
    let pod = Pod::start(move |_, _| {
        let writers = writers.clone();
        async move {
            let (mut answer, writer) = written();
            answer.headers_mut().insert("content-type", "text/event-stream".parse().unwrap());
            writers.send(writer).await?;
            Ok(answer)
        }
    })
    .await;
    (pod, answers)
}

fn table(pod: &Pod) -> TableBuilder {
    TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])
}

const CANCELLED: &str = r#"trustformers_gateway_requests_total{code="cancelled",protocol="http",revision="r1",route="default/a"}"#;
const ANSWERED: &str =
    r#"trustformers_gateway_requests_total{code="2xx",protocol="http",revision="r1",route="default/a"}"#;
const BROKEN: &str =
    r#"trustformers_gateway_requests_total{code="broken",protocol="http",revision="r1",route="default/a"}"#;
const IN_FLIGHT: &str = r#"trustformers_gateway_in_flight{revision="r1",route="default/a"}"#;

#[tokio::test]
async fn each_piece_passes_before_the_next_is_written() {
    let (pod, mut writers) = writing_pod().await;
    let scene = Scene::with_table(table(&pod)).await;
    for http2 in [false, true] {
        let client = client(http2);
        let request = post(scene.http(), "/v1/generate/stream", r#"{"model": "a"}"#);
        let mut response = client.request(request).await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let writer = writers.recv().await.unwrap();
        for text in ["data: {\"text\": \"one\"}\n\n", "data: {\"text\": \"two\"}\n\n", "data: [DONE]\n\n"] {
            writer.send(piece(text)).await.unwrap();
            let frame = soon("a piece", response.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), text);
        }
        drop(writer);
        let rest = soon("the end", response.into_body().collect()).await.unwrap();
        assert!(rest.to_bytes().is_empty());
    }
    until("both to be counted", || async { scene.metric(ANSWERED).await > 1.5 }).await;
}

#[tokio::test]
async fn a_disconnect_during_an_answer_stops_the_pod() {
    let (pod, mut writers) = writing_pod().await;
    let scene = Scene::with_table(table(&pod)).await;
    for (http2, count) in [(false, 1.0), (true, 2.0)] {
        let client = client(http2);
        let mut response =
            client.request(post(scene.http(), "/v1/generate", r#"{"model": "a"}"#)).await.unwrap();
        let writer = writers.recv().await.unwrap();
        writer.send(piece("x")).await.unwrap();
        soon("a piece", response.frame()).await.unwrap().unwrap();
        drop(response);
        soon("the pod's stream to be reset", writer.closed()).await;
        until("it to be counted", || async { scene.metric(CANCELLED).await >= count }).await;
    }
    assert!(scene.metric(IN_FLIGHT).await.abs() < 1e-9);
}

#[tokio::test]
async fn a_disconnect_before_the_head_stops_the_pod() {
    struct Alarm(mpsc::Sender<&'static str>);
    impl Drop for Alarm {
        fn drop(&mut self) {
            let _sent = self.0.try_send("ended");
        }
    }
    let (events, mut received) = mpsc::channel(8);
    let pod = Pod::start(move |_, _| {
        let alarm = Alarm(events.clone());
        async move {
            alarm.0.send("begun").await?;
            std::future::pending::<()>().await;
            unreachable!("the request is never answered")
        }
    })
    .await;
    let scene = Scene::with_table(table(&pod)).await;
    for http2 in [false, true] {
        let client = client(http2);
        let call = tokio::spawn(client.request(post(scene.http(), "/v1/generate", r#"{"model": "a"}"#)));
        assert_eq!(soon("the pod to begin", received.recv()).await, Some("begun"));
        call.abort();
        assert_eq!(soon("the pod's work to be dropped", received.recv()).await, Some("ended"));
    }
    until("both to be counted", || async { scene.metric(CANCELLED).await > 1.5 }).await;
    assert!(scene.metric(IN_FLIGHT).await.abs() < 1e-9);
}

#[tokio::test]
async fn no_retry_happens_once_a_byte_has_come() {
    let (breaking, mut writers) = writing_pod().await;
    let other = Pod::named("other").await;
    let scene = Scene::with_table(table(&breaking)).await;
    let mut response = scene.request("a").await;
    let writer = writers.recv().await.unwrap();
    let both = TableBuilder::new(1, 2).route("a").backend("r1", 1, &[breaking.address, other.address]);
    scene.publish(both).await;
    writer.send(piece("half an ans")).await.unwrap();
    assert_eq!(soon("a piece", response.frame()).await.unwrap().unwrap().into_data().unwrap(), "half an ans");
    breaking.kill().await;
    // The caller must see that the answer is incomplete: an error, and not a regular end.
    assert!(soon("the break", response.frame()).await.unwrap().is_err());
    assert_eq!(other.requests(), 0);
    assert!((scene.metric(BROKEN).await - 1.0).abs() < 1e-9);
}

#[tokio::test]
async fn streams_outlive_the_removal_of_their_pod() {
    let (leaving, mut writers) = writing_pod().await;
    let staying = Pod::named("staying").await;
    let scene = Scene::with_table(table(&leaving)).await;
    let response = scene.request("a").await;
    let writer = writers.recv().await.unwrap();
    scene.publish(TableBuilder::new(1, 2).route("a").backend("r1", 1, &[staying.address])).await;
    for _ in 0..5 {
        assert_eq!(scene.answer("a").await.1, "staying");
    }
    writer.send(piece("to the ")).await.unwrap();
    writer.send(piece("end")).await.unwrap();
    drop(writer);
    assert_eq!(text(response).await.1, "to the end");
    // Its connection carries no stream and will not be used again, so it is closed.
    leaving.disconnected().await;
}
