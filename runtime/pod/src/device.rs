//! Which backend a device's name means. The only file that knows the backends.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_plan::{Backend, BackendError, Caps, EstimateSpec, LoadSpec, Loaded, MemoryReport};

use crate::spec::ModelSpec;

/// The device that a configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The best one there is; today the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
}

/// A device that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// This version has no such device.
    #[error("device {found:?} is not available in this version; use \"auto\" or \"cpu\"")]
    NotAvailable {
        /// What was asked for.
        found: String,
    },
    /// The device is there but cannot be used.
    #[error("device {device:?} cannot be used: {message}")]
    Unusable {
        /// Which.
        device: String,
        /// The backend's own words.
        message: String,
    },
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            other => Err(DeviceError::NotAvailable { found: other.to_owned() }),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
        })
    }
}

/// Makes the backend for a model. A parameter of loading, so that tests can bring their own.
pub type OpenDevice = Box<dyn Fn(&ModelSpec) -> Result<Box<dyn Backend>, DeviceError> + Send + Sync>;

/// The real devices. Models on the CPU share its threads, one step at a time: two sets of threads on the same
/// cores would wait for each other at every barrier.
pub fn real() -> OpenDevice {
    let cpu: Mutex<Option<SharedBackend>> = Mutex::new(None);
    Box::new(move |spec| match spec.device {
        DeviceChoice::Auto | DeviceChoice::Cpu => {
            let mut cpu = cpu.lock().unwrap_or_else(PoisonError::into_inner);
            let shared = match &*cpu {
                Some(shared) => shared.clone(),
                None => cpu.insert(open_cpu(spec)?).clone(),
            };
            Ok(Box::new(shared))
        }
    })
}

fn open_cpu(spec: &ModelSpec) -> Result<SharedBackend, DeviceError> {
    let backend = CpuBackend::new(CpuConfig { threads: spec.threads, ..CpuConfig::default() })
        .map_err(|error| DeviceError::Unusable { device: "cpu".to_owned(), message: error.to_string() })?;
    Ok(SharedBackend { caps: backend.caps().clone(), backend: Arc::new(Mutex::new(Box::new(backend))) })
}

/// One backend for several engines.
#[derive(Clone)]
struct SharedBackend {
    caps: Caps,
    backend: Arc<Mutex<Box<dyn Backend>>>,
}

impl Backend for SharedBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner).estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner).load(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_devices_are_read_and_others_refused_by_name() {
        for device in [DeviceChoice::Auto, DeviceChoice::Cpu] {
            assert_eq!(device.to_string().parse::<DeviceChoice>().unwrap(), device);
        }
        let error = "cuda:0".parse::<DeviceChoice>().unwrap_err();
        assert!(error.to_string().contains("cuda:0") && error.to_string().contains("cpu"), "{error}");
    }
}
