//! Two models on one device: neither changes an answer of the other, and one may leave while the other works.

use crate::{CompletedAnswer, answer, config, model, prompt, tokens};
use futures::future::join_all;
use std::path::Path;
use std::sync::{Arc, Mutex};
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::{Engine, EngineConfig, EngineMetrics, GenerateParams, Numerics};
use trustformers_model::Model;
use trustformers_model::seeded::SeededModel;
use trustformers_plan::{Backend, BackendError, Caps, EstimateSpec, LoadSpec, Loaded, MemoryReport};

/// One device for several engines.
#[derive(Clone)]
pub(crate) struct SharedDevice(Caps, Arc<Mutex<Box<dyn Backend>>>);

impl SharedDevice {
    pub(crate) fn new(device: Box<dyn Backend>) -> Self {
        Self(device.caps().clone(), Arc::new(Mutex::new(device)))
    }

    fn cpu() -> Self {
        Self::new(Box::new(CpuBackend::new(CpuConfig::default()).unwrap()))
    }
}

impl Backend for SharedDevice {
    fn caps(&self) -> &Caps {
        &self.0
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.1.lock().unwrap().estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        self.1.lock().unwrap().load(spec)
    }
}

fn start_on(cpu: &SharedDevice, model: Arc<Model>) -> Engine {
    let config = EngineConfig { numerics: Numerics::Exact, ..config() };
    let metrics = EngineMetrics::unregistered().unwrap();
    Engine::start(model, Box::new(cpu.clone()), &config, &metrics).unwrap()
}

fn requests() -> Vec<GenerateParams> {
    (0..12)
        .map(|salt| GenerateParams {
            temperature: if salt % 2 == 0 { 0.0 } else { 1.1 },
            top_p: 0.9,
            seed: Some(salt as u64),
            logprobs: Some(2),
            ..tokens(&prompt(5 + 7 * salt, salt), 40)
        })
        .collect()
}

async fn answers(engine: &Engine) -> Vec<CompletedAnswer> {
    let running: Vec<_> = requests().iter().map(|request| engine.submit(request).unwrap()).collect();
    join_all(running.into_iter().map(answer)).await.into_iter().map(Result::unwrap).collect()
}

#[tokio::test]
async fn models_on_one_device_give_the_answers_that_they_give_alone() {
    let other = SeededModel { seed: 3, layers: 3, ..SeededModel::default() }.gguf();
    let other = Arc::new(Model::from_bytes(Path::new("other.gguf"), Arc::new(other)).unwrap());
    let models = [model(), other];
    let mut alone = Vec::new();
    for model in &models {
        alone.push(answers(&start_on(&SharedDevice::cpu(), Arc::clone(model))).await);
    }
    assert_ne!(alone[0], alone[1]);
    let cpu = SharedDevice::cpu();
    let [first, second] = models.map(|model| start_on(&cpu, model));
    let together = futures::join!(answers(&first), answers(&second));
    assert_eq!([together.0, together.1], [alone[0].clone(), alone[1].clone()]);
    // The first one leaves while the second one works.
    let ((), again) = futures::join!(first.stop(), answers(&second));
    assert_eq!(again, alone[1]);
}
