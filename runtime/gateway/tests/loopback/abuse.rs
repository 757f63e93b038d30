//! Many hostile callers at once: others keep being answered, and what they can make the gateway hold has a
//! bound. Single ones are in `hostile`.

use std::net::{Ipv4Addr, SocketAddr};

use bytes::Bytes;
use futures::future::join_all;
use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;

use crate::operator::TableBuilder;
use crate::pods::{Pod, piece, written};
use crate::{Scene, post, soon, text};

/// Where hostile callers come from; the bounds are shared between addresses.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);

async fn connect(from: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((from, 0))).unwrap();
    soon("a connection", socket.connect(to)).await.unwrap()
}

/// A connection that has sent this.
async fn sent(from: Ipv4Addr, to: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = connect(from, to).await;
    stream.write_all(bytes).await.unwrap();
    stream
}

async fn with_one_pod() -> (Pod, Scene) {
    let pod = Pod::named("one").await;
    let table = TableBuilder::new(1, 1).route("a").accepting_caller_headers();
    let scene = Scene::with_table(table.backend("r1", 1, &[pod.address])).await;
    (pod, scene)
}

async fn others_are_answered(scene: &Scene) {
    for _ in 0..20 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "one".to_owned()));
    }
}

#[tokio::test]
async fn heads_and_bodies_that_never_end_delay_nobody() {
    let (pod, scene) = with_one_pod().await;
    let upload = "POST /v1/generate HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{\"prompt\": \"";
    let beginnings =
        ["GET /v1/mod", "POST /v1/generate HTTP/1.1\r\nx-a: b", "PRI * HTTP/2.0\r\n\r\n", upload];
    let http = scene.http();
    let held = join_all((0..200).map(|index| sent(ELSEWHERE, http, beginnings[index % 4].as_bytes()))).await;
    others_are_answered(&scene).await;
    assert_eq!(pod.requests(), 20, "nothing of the others has reached a pod");
    drop(held);
}

#[tokio::test]
async fn uploads_that_fill_a_callers_share_leave_the_rest_to_others() {
    let (pod, scene) = with_one_pod().await;
    // Bodies that name no model before their end are held: 3.9 MB of the 4 MiB that one may have.
    let length = 3_900_000;
    let head = format!("POST /v1/generate HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n");
    let mut body = head.into_bytes();
    body.extend_from_slice(b"{\"prompt\": \"");
    body.resize(body.len() + length - 100, b'p');
    let body = Bytes::from(body);
    let (refused, mut refusals) = mpsc::channel(32);
    // One caller may have 64 MiB; these are 78 MB.
    let uploads: Vec<_> = (0..20)
        .map(|_| {
            let (body, refused, http) = (body.clone(), refused.clone(), scene.http());
            tokio::spawn(async move {
                let mut stream = connect(ELSEWHERE, http).await;
                // A refusal may come before all of it is sent.
                let _sent_or_refused = stream.write_all(&body).await;
                let mut answer = [0; 12];
                if stream.read_exact(&mut answer).await.is_ok() {
                    let _wanted = refused.send(answer).await;
                }
            })
        })
        .collect();
    assert_eq!(&soon("a refusal", refusals.recv()).await.unwrap(), b"HTTP/1.1 429");
    others_are_answered(&scene).await;
    let long = format!(r#"{{"prompt": "{}", "model": "a"}}"#, "p".repeat(200_000));
    let response = scene.client.request(post(scene.http(), "/v1/generate", long)).await.unwrap();
    assert_eq!(text(response).await, (StatusCode::OK, "one".to_owned()));
    assert_eq!(pod.requests(), 21);
    uploads.into_iter().for_each(|upload| upload.abort());
}

#[tokio::test]
async fn streams_that_stall_and_readers_that_stop_delay_nobody() {
    let (writers, mut streams) = mpsc::channel(1);
    let stalling = Pod::start(move |_, _| {
        let writers = writers.clone();
        async move {
            let (answer, writer) = written();
            writers.send(writer).await?;
            Ok(answer)
        }
    })
    .await;
    let pod = Pod::named("one").await;
    let table = TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address]);
    let scene = Scene::with_table(table.route("slow").backend("r1", 1, &[stalling.address])).await;
    let body = r#"{"model": "slow", "prompt": "p"}"#;
    let request = format!(
        "POST /v1/generate/stream HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let (mut held, mut writing) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        held.push(sent(ELSEWHERE, scene.http(), request.as_bytes()).await);
        let writer = soon("the stream", streams.recv()).await.unwrap();
        // A token, and no more; nobody reads it either.
        writer.send(piece("data: {}\n\n")).await.unwrap();
        writing.push(writer);
    }
    others_are_answered(&scene).await;
    let in_flight = r#"trustformers_gateway_in_flight{revision="r1",route="default/slow"}"#;
    assert!((scene.metric(in_flight).await - 100.0).abs() < 1e-9);
    // Callers that leave free what they held.
    drop(held);
    crate::until("the streams to be cancelled", || async { scene.metric(in_flight).await < 0.5 }).await;
}

#[tokio::test]
async fn tenants_users_and_models_that_are_made_up_leave_nothing_behind() {
    let (pod, scene) = with_one_pod().await;
    others_are_answered(&scene).await;
    let series = async || scene.get("/metrics").await.1.lines().filter(|line| !line.starts_with('#')).count();
    let before = series().await;
    for number in 0..500 {
        let model = if number % 2 == 0 { "a".to_owned() } else { format!("made-up-{number}") };
        let body = format!(r#"{{"model": "{model}", "prompt": "p"}}"#);
        let mut request = post(scene.http(), "/v1/generate", body);
        for name in ["x-gateway-inference-fairness-id", "x-user-id", "x-request-id"] {
            request.headers_mut().insert(name, format!("made-up-{number}").parse().unwrap());
        }
        let response = soon("an answer", scene.client.request(request)).await.unwrap();
        let expected = if number % 2 == 0 { StatusCode::OK } else { StatusCode::NOT_FOUND };
        assert_eq!(text(response).await.0, expected);
    }
    // One series for the refusals, whatever their number.
    let after = series().await;
    assert!(after <= before + 1, "{before} series, then {after}");
    assert_eq!(pod.requests(), 20 + 250);
}
