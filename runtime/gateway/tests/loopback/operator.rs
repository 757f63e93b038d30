//! A fake operator: publishes the tables of a test and records the reports of the gateway.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use trustformers_proto::control::v1 as wire;
use trustformers_proto::control::v1::route_service_server::{RouteService, RouteServiceServer};

use crate::soon;

/// Builds a table.
#[derive(Clone)]
pub(crate) struct TableBuilder(wire::RouteTable);

impl TableBuilder {
    pub(crate) fn new(term: u64, counter: u64) -> Self {
        Self(wire::RouteTable { version: Some(wire::TableVersion { term, counter }), routes: Vec::new() })
    }

    /// Adds a route with the names `default/NAME` and `NAME`.
    pub(crate) fn route(mut self, name: &str) -> Self {
        self.0.routes.push(wire::Route {
            name: format!("default/{name}"),
            aliases: vec![format!("default/{name}"), name.to_owned()],
            backends: Vec::new(),
            policy: Some(wire::Policy { retries: 1, ..wire::Policy::default() }),
            ..wire::Route::default()
        });
        self
    }

    /// Sets the last route's task.
    pub(crate) fn task(mut self, task: &str) -> Self {
        self.0.routes.last_mut().unwrap().task = task.to_owned();
        self
    }

    /// Sets the last route's policy.
    pub(crate) fn policy(mut self, first_byte_timeout_ms: u64, retries: u32) -> Self {
        let policy = self.0.routes.last_mut().unwrap().policy.as_mut().unwrap();
        (policy.first_byte_timeout_ms, policy.retries) = (first_byte_timeout_ms, retries);
        self
    }

    /// Changes the last route's policy.
    pub(crate) fn with_policy(mut self, change: impl FnOnce(&mut wire::Policy)) -> Self {
        change(self.0.routes.last_mut().unwrap().policy.as_mut().unwrap());
        self
    }

    /// The last route is shared by variants.
    pub(crate) fn test(mut self, test: wire::RouteTest) -> Self {
        self.0.routes.last_mut().unwrap().test = Some(test);
        self
    }

    /// The last backend belongs to this variant.
    pub(crate) fn variant(mut self, name: &str) -> Self {
        name.clone_into(&mut self.0.routes.last_mut().unwrap().backends.last_mut().unwrap().variant);
        self
    }

    /// Sets the last route's split.
    pub(crate) fn split(mut self, split: wire::Split) -> Self {
        self.0.routes.last_mut().unwrap().split = Some(split);
        self
    }

    /// Another revision answers a share of the last route's requests as well.
    pub(crate) fn shadow(mut self, revision: &str, percent: u32) -> Self {
        let shadow = wire::Shadow { revision: revision.to_owned(), percent, ..wire::Shadow::default() };
        self.0.routes.last_mut().unwrap().shadow = Some(shadow);
        self
    }

    /// Another route answers every request of the last one as well.
    pub(crate) fn shadow_route(mut self, route: &str, discard: bool) -> Self {
        let route = route.to_owned();
        let shadow = wire::Shadow { route, discard, percent: 100, ..wire::Shadow::default() };
        self.0.routes.last_mut().unwrap().shadow = Some(shadow);
        self
    }

    /// The last backend keeps its share while it has no pod.
    pub(crate) fn keeps_share(mut self) -> Self {
        self.0.routes.last_mut().unwrap().backends.last_mut().unwrap().keeps_share = true;
        self
    }

    /// The last route holds requests this long while it has no pod.
    pub(crate) fn hold(mut self, hold_ms: u64) -> Self {
        self.0.routes.last_mut().unwrap().policy.as_mut().unwrap().hold_ms = hold_ms;
        self
    }

    /// Callers of the last route may name their tenant and choose their priority class.
    pub(crate) fn accepting_caller_headers(mut self) -> Self {
        let policy = self.0.routes.last_mut().unwrap().policy.as_mut().unwrap();
        (policy.accept_tenant, policy.accept_priority) = (true, true);
        self
    }

    /// Adds a revision to the last route. Its pods have one port for HTTP and gRPC.
    pub(crate) fn backend(mut self, revision: &str, weight: u32, pods: &[SocketAddr]) -> Self {
        let endpoints = pods.iter().map(|address| wire::Endpoint {
            pod_name: format!("pod-{}", address.port()),
            pod_uid: format!("uid-{}", address.port()),
            restart_count: 0,
            address: address.ip().to_string(),
            http_port: u32::from(address.port()),
            grpc_port: u32::from(address.port()),
            ..wire::Endpoint::default()
        });
        self.0.routes.last_mut().unwrap().backends.push(wire::Backend {
            revision: revision.to_owned(),
            digest: format!("digest-{revision}"),
            weight,
            endpoints: endpoints.collect(),
            ..wire::Backend::default()
        });
        self
    }

    /// The pods of all backends of the last route hold more than one revision.
    pub(crate) fn by_revision(mut self) -> Self {
        let backends = &mut self.0.routes.last_mut().unwrap().backends;
        backends.iter_mut().flat_map(|one| &mut one.endpoints).for_each(|end| end.by_revision = true);
        self
    }

    pub(crate) fn version(&self) -> wire::TableVersion {
        self.0.version.unwrap()
    }
}

#[derive(Default)]
struct Received {
    reports: Vec<wire::GatewayReport>,
    tokens: Vec<Option<String>>,
}

struct Service {
    tables: watch::Receiver<Option<wire::RouteTable>>,
    received: Arc<Mutex<Received>>,
    changed: Arc<watch::Sender<()>>,
}

#[tonic::async_trait]
impl RouteService for Service {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::RouteTable, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<wire::GatewayReport>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let token = request.metadata().get("authorization").map(|token| token.to_str().unwrap().to_owned());
        self.received.lock().unwrap().tokens.push(token);
        let mut reports = request.into_inner();
        let (received, changed) = (Arc::clone(&self.received), Arc::clone(&self.changed));
        let ended = CancellationToken::new();
        let reports_end = ended.clone().drop_guard();
        tokio::spawn(async move {
            let _reports_end = reports_end;
            while let Some(Ok(report)) = reports.next().await {
                received.lock().unwrap().reports.push(report);
                changed.send_replace(());
            }
        });
        let tables = WatchStream::new(self.tables.clone()).filter_map(async |table| table.map(Ok));
        let tables = tables.take_until(ended.cancelled_owned());
        Ok(Response::new(Box::pin(tables)))
    }
}

/// A running fake operator.
pub(crate) struct Operator {
    address: SocketAddr,
    tables: watch::Sender<Option<wire::RouteTable>>,
    received: Arc<Mutex<Received>>,
    changed: Arc<watch::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

impl Operator {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut operator = Self {
            address: listener.local_addr().unwrap(),
            tables: watch::Sender::new(None),
            received: Arc::default(),
            changed: Arc::new(watch::Sender::new(())),
            server: None,
        };
        operator.serve(listener);
        operator
    }

    fn serve(&mut self, listener: TcpListener) {
        let service = Service {
            tables: self.tables.subscribe(),
            received: Arc::clone(&self.received),
            changed: Arc::clone(&self.changed),
        };
        let server = tonic::transport::Server::builder()
            .add_service(RouteServiceServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener));
        self.server = Some(tokio::spawn(async move { server.await.unwrap() }));
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops: every stream breaks and the port is closed.
    pub(crate) async fn stop(&mut self) {
        let server = self.server.take().unwrap();
        server.abort();
        let _aborted = server.await;
        // tonic serves connections on tasks of their own; a stream that ends breaks them too.
        let (tables, _) = watch::channel(None);
        let last = self.tables.borrow().clone();
        self.tables = tables;
        self.tables.send_replace(last);
    }

    /// Starts again at the same address.
    pub(crate) async fn restart(&mut self) {
        let listener = soon("the operator's port", async {
            loop {
                match TcpListener::bind(self.address).await {
                    Ok(listener) => return listener,
                    Err(_in_use) => tokio::task::yield_now().await,
                }
            }
        })
        .await;
        self.serve(listener);
    }

    pub(crate) fn publish(&self, table: TableBuilder) {
        self.tables.send_replace(Some(table.0));
    }

    pub(crate) fn tokens(&self) -> Vec<Option<String>> {
        self.received.lock().unwrap().tokens.clone()
    }

    pub(crate) fn reports(&self) -> usize {
        self.received.lock().unwrap().reports.len()
    }

    /// The last that was reported of each route and revision.
    pub(crate) fn counts(&self) -> BTreeMap<(String, String), wire::RevisionCounts> {
        let received = self.received.lock().unwrap();
        let counts = received.reports.iter().flat_map(|report| &report.counts);
        counts.map(|counts| ((counts.route.clone(), counts.revision.clone()), counts.clone())).collect()
    }

    /// The last that each process reported of each route, of all its revisions alike.
    pub(crate) fn counts_by_process(&self) -> BTreeMap<(String, String), wire::RevisionCounts> {
        let received = self.received.lock().unwrap();
        let counts = received.reports.iter().flat_map(|report| {
            report
                .counts
                .iter()
                .map(|counts| ((report.process.clone(), counts.route.clone()), counts.clone()))
        });
        counts.collect()
    }

    /// Everything that was reported of variants.
    pub(crate) fn variants(&self) -> Vec<wire::VariantCounts> {
        let received = self.received.lock().unwrap();
        received.reports.iter().flat_map(|report| report.variants.clone()).collect()
    }

    /// Waits for a report that matches, among those behind the first `skip`.
    pub(crate) async fn report(
        &self,
        skip: usize,
        matches: impl Fn(&wire::GatewayReport) -> bool,
    ) -> wire::GatewayReport {
        let mut changed = self.changed.subscribe();
        soon("a report", async {
            loop {
                changed.mark_unchanged();
                let found = self
                    .received
                    .lock()
                    .unwrap()
                    .reports
                    .iter()
                    .skip(skip)
                    .find(|report| matches(report))
                    .cloned();
                if let Some(found) = found {
                    return found;
                }
                changed.changed().await.unwrap();
            }
        })
        .await
    }

    pub(crate) async fn acknowledged(&self, version: wire::TableVersion) {
        self.report(0, |report| report.acknowledged == Some(version)).await;
    }
}
