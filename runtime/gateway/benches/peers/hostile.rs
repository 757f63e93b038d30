//! Callers that send slowly, stop in the middle, read slowly, leave, and make names up. Each begins again
//! when the gateway ends what it does.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::load;

/// Streams that bring one token and no more, and whose callers read nothing.
pub(crate) const STALLED_STREAMS: usize = 2048;
/// Uploads that stop after a kilobyte.
pub(crate) const STALLED_UPLOADS: usize = 64;
/// Heads of which a byte comes each second.
pub(crate) const SLOW_HEADS: usize = 256;
/// Callers that read some bytes of a stream now and then.
pub(crate) const SLOW_READERS: usize = 64;
/// Callers that name another tenant, user and model with each request.
pub(crate) const MADE_UP: usize = 8;
/// Callers of a model without pods: half of them leave while they are held.
pub(crate) const HELD: usize = 32;
/// They come from this many addresses, since the bounds are shared between addresses.
const ADDRESSES: usize = 32;
/// Before one begins again.
const PAUSE: Duration = Duration::from_millis(250);

/// Hostile callers, until they are stopped.
pub(crate) struct Hostile {
    address: SocketAddr,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Hostile {
    /// All of them, at the gateway's address.
    pub(crate) fn start(address: SocketAddr) -> Self {
        let mut hostile = Self { address, stop: CancellationToken::new(), tasks: JoinSet::new() };
        hostile.spawn(STALLED_STREAMS, |address, source, _| stalled_stream(address, source));
        hostile.spawn(STALLED_UPLOADS, |address, source, _| stalled_upload(address, source));
        hostile.spawn(SLOW_HEADS, |address, source, _| slow_head(address, source));
        hostile.spawn(SLOW_READERS, |address, source, _| slow_reader(address, source));
        hostile.spawn(MADE_UP, made_up);
        hostile.spawn(HELD, held);
        hostile
    }

    /// Callers that do this again and again. Each gets an address to come from and a number that counts.
    fn spawn<F, W>(&mut self, count: usize, work: F)
    where
        F: Fn(SocketAddr, Ipv4Addr, u64) -> W + Copy + Send + 'static,
        W: Future<Output = std::io::Result<()>> + Send + 'static,
    {
        for index in 0..count {
            let (address, stop) = (self.address, self.stop.clone());
            let last = u8::try_from(1 + index % ADDRESSES).unwrap_or(1);
            let source = Ipv4Addr::new(127, 0, 1, last);
            self.tasks.spawn(async move {
                let mut number = index as u64;
                let once = move |number| async move {
                    // Refused, ended or cut: all of it is what the gateway may do.
                    let _ended = work(address, source, number).await;
                    sleep(PAUSE).await;
                };
                while stop.run_until_cancelled(once(number)).await.is_some() {
                    number = number.wrapping_add(count as u64);
                }
            });
        }
    }

    /// All of them leave.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Until the other side closes the connection. What it sends is thrown away.
async fn until_closed(mut stream: TcpStream) -> std::io::Result<()> {
    let mut bytes = [0; 1024];
    while stream.read(&mut bytes).await? > 0 {}
    Ok(())
}

async fn stalled_stream(address: SocketAddr, source: Ipv4Addr) -> std::io::Result<()> {
    until_closed(load::opened_stream(address, source).await?).await
}

async fn stalled_upload(address: SocketAddr, source: Ipv4Addr) -> std::io::Result<()> {
    let mut stream = load::connect(address, source).await?;
    let head = "POST /v1/generate HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n";
    let begin = format!("{head}{{\"model\": \"a\", \"prompt\": \"{}", "p".repeat(1024));
    stream.write_all(begin.as_bytes()).await?;
    until_closed(stream).await
}

async fn slow_head(address: SocketAddr, source: Ipv4Addr) -> std::io::Result<()> {
    let mut stream = load::connect(address, source).await?;
    stream.write_all(b"POST /v1/generate HTTP/1.1\r\nhost: a\r\nx-slow: ").await?;
    loop {
        sleep(Duration::from_secs(1)).await;
        stream.write_all(b"s").await?;
    }
}

async fn slow_reader(address: SocketAddr, source: Ipv4Addr) -> std::io::Result<()> {
    let mut stream = load::connect(address, source).await?;
    stream.write_all(load::head("a", "stream", "").as_bytes()).await?;
    let mut bytes = [0; 64];
    while stream.read(&mut bytes).await? > 0 {
        sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn made_up(address: SocketAddr, source: Ipv4Addr, number: u64) -> std::io::Result<()> {
    let model = if number.is_multiple_of(2) { "a".to_owned() } else { format!("made-up-{number}") };
    let names = format!(
        "x-gateway-inference-fairness-id: tenant-{number}\r\nx-user-id: user-{number}\r\n\
         x-request-id: request-{number}\r\nconnection: close\r\n"
    );
    let mut stream = load::connect(address, source).await?;
    stream.write_all(load::head(&model, "answer", &names).as_bytes()).await?;
    until_closed(stream).await
}

async fn held(address: SocketAddr, source: Ipv4Addr, number: u64) -> std::io::Result<()> {
    let mut stream = load::connect(address, source).await?;
    stream.write_all(load::head("waiting", "answer", "connection: close\r\n").as_bytes()).await?;
    if number.is_multiple_of(2) {
        return until_closed(stream).await;
    }
    // The caller leaves while its request is held.
    let _left = timeout(Duration::from_millis(300), until_closed(stream)).await;
    Ok(())
}
