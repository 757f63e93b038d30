//! A whole process whose device is the scalar oracle behind a gate, so that a test decides when a step may be
//! made and nothing depends on how fast the machine is.

#![allow(dead_code, reason = "each test that includes this file needs a part of it")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use prometheus::Registry;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;
use trustformers_api::browser::AllowedOrigins;
use trustformers_model::seeded::SeededModel;
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded, MemoryReport, Plan, SampleInput,
    StepInput, StepOutput,
};
use trustformers_proto::v1::{GenerateRequest, ModelState, ModelStatus};
use trustformers_runtime::control::{LoadDefaults, ModelControl};
use trustformers_runtime::faults::Faults;
use trustformers_runtime::process::{Drain, Listen, Process, Settings, Sight};
use trustformers_runtime::spec::ModelSpec;
use trustformers_store::Source;

/// Counts down the steps that may still be made; `usize::MAX` is any number.
#[derive(Clone)]
pub(crate) struct Gate(Arc<(Mutex<Steps>, Condvar)>);

struct Steps {
    left: usize,
    /// Whether a step waits to be allowed.
    blocked: bool,
    /// Whether the device fails every step.
    fails: bool,
}

impl Gate {
    pub(crate) fn open() -> Self {
        Self(Arc::new((Mutex::new(Steps { left: usize::MAX, blocked: false, fails: false }), Condvar::new())))
    }
    pub(crate) fn allow(&self, steps: usize) {
        self.0.0.lock().unwrap().left = steps;
        self.0.1.notify_all();
    }
    pub(crate) fn fail(&self, fails: bool) {
        self.0.0.lock().unwrap().fails = fails;
    }
    fn pass(&self) -> Result<(), BackendError> {
        let mut steps = self.0.0.lock().unwrap();
        steps.blocked = steps.left == 0;
        self.0.1.notify_all();
        let mut steps = self.0.1.wait_while(steps, |steps| steps.left == 0).unwrap();
        steps.blocked = false;
        if steps.left != usize::MAX {
            steps.left -= 1;
        }
        if steps.fails { Err(BackendError::Device("the test pulled the plug".into())) } else { Ok(()) }
    }
    /// Waits until the device's thread stands at the gate.
    pub(crate) async fn until_blocked(&self) {
        let gate = self.clone();
        let waiting =
            move || drop(gate.0.1.wait_while(gate.0.0.lock().unwrap(), |steps| !steps.blocked).unwrap());
        tokio::task::spawn_blocking(waiting).await.unwrap();
    }
}

/// The oracle behind a gate.
struct Gated<T: ?Sized>(Gate, Box<T>);

impl Backend for Gated<dyn Backend> {
    fn caps(&self) -> &Caps {
        self.1.caps()
    }
    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.1.estimate(spec)
    }
    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        Ok(Box::new(Gated(self.0.clone(), self.1.load(spec)?)))
    }
}

impl Loaded for Gated<dyn Loaded> {
    fn memory(&self) -> MemoryReport {
        self.1.memory()
    }
    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(Gated(self.0.clone(), self.1.compile(plan)?)))
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        self.1.resize_kv(blocks)
    }
}

impl Executable for Gated<dyn Executable> {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        self.0.pass()?;
        self.1.submit(input)
    }
    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        self.1.sample(input)
    }
    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.1.wait(output)
    }
}

/// The file of a model whose steps are always allowed.
pub(crate) const UNGATED: &str = "ungated.gguf";

pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) gate: Gate,
    pub(crate) http: SocketAddr,
    pub(crate) folder: TempDir,
}

/// The settings of a test that differ from the defaults.
pub(crate) struct Setup {
    pub(crate) bytes: Vec<u8>,
    pub(crate) sha256: Option<String>,
    pub(crate) drain: Drain,
    pub(crate) model_control: ModelControl,
    pub(crate) sight: Sight,
    pub(crate) faults: Faults,
    /// Requests that may wait for the one that runs; none: the default, for a batch of the default size.
    pub(crate) max_queue: Option<usize>,
}

impl Default for Setup {
    fn default() -> Self {
        let drain = Drain { quiet: Duration::ZERO, timeout: Duration::from_secs(60) };
        let model_control = ModelControl::Allowed(LoadDefaults::default());
        let bytes = SeededModel::default().gguf();
        let (sight, faults) = (Sight::default(), Faults::default());
        Self { bytes, sha256: None, drain, model_control, sight, faults, max_queue: None }
    }
}

pub(crate) async fn start(setup: Setup) -> Server {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("m.gguf"), setup.bytes).unwrap();
    let mut spec = ModelSpec::new("m", Source::from_path(folder.path()));
    spec.sha256 = setup.sha256;
    if let Some(max_queue) = setup.max_queue {
        (spec.engine.max_batch_size, spec.engine.max_queue) = (1, max_queue);
    }
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let settings = Settings {
        models: vec![spec],
        listen: Listen { http: any, grpc: any, metrics: None, allowed_origins: AllowedOrigins::Any },
        drain: setup.drain,
        model_control: setup.model_control,
        admin: None,
        sight: setup.sight,
        faults: setup.faults,
    };
    let gate = Gate::open();
    let behind = gate.clone();
    let open = Box::new(move |spec: &ModelSpec| {
        let backend: Box<dyn Backend> = Box::new(Oracle::new());
        if spec.source.path().is_some_and(|path| path.ends_with(UNGATED)) {
            return Ok(backend);
        }
        Ok(Box::new(Gated(behind.clone(), backend)) as Box<dyn Backend>)
    });
    let process = Process::start(settings, Registry::new(), open).await.unwrap();
    let http = process.http_address();
    Server { process, gate, http, folder }
}

impl Server {
    pub(crate) async fn until(&self, state: ModelState) -> ModelStatus {
        let mut watch = self.process.models().statuses().watch();
        let models = watch.wait_for(|models| models[0].state() == state).await.unwrap();
        models[0].clone()
    }

    /// Waits until the model of this name is in a state.
    pub(crate) async fn until_named(&self, name: &str, state: ModelState) {
        let mut watch = self.process.models().statuses().watch();
        let is = |model: &ModelStatus| model.name == name && model.state() == state;
        watch.wait_for(|models| models.iter().any(is)).await.unwrap();
    }

    /// Names of the models that are listed.
    pub(crate) fn names(&self) -> Vec<String> {
        let models = self.process.models().statuses().watch().borrow().clone();
        models.iter().map(|model| model.name.clone()).collect()
    }

    /// Writes another file into the folder and gives a model of it.
    pub(crate) fn another(&self, name: &str, file: &str, bytes: &[u8]) -> ModelSpec {
        let file = self.folder.path().join(file);
        std::fs::write(&file, bytes).unwrap();
        ModelSpec::new(name, Source::from_path(file))
    }

    pub(crate) async fn channel(&self) -> Channel {
        let address = format!("http://{}", self.process.grpc_address());
        Channel::from_shared(address).unwrap().connect().await.unwrap()
    }
}

/// The whole answer to a request on a connection of its own.
pub(crate) async fn http(address: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut connection = TcpStream::connect(address).await?;
    connection.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    connection.read_to_string(&mut text).await?;
    Ok(text)
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
    http(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await.unwrap()
}

pub(crate) fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
}

pub(crate) fn prompt(max_tokens: u32) -> GenerateRequest {
    GenerateRequest { prompt: "Hello".into(), max_tokens, ..Default::default() }
}
