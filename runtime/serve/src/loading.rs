//! What every command with a model and files does first: read its flags and files, load the model, show how
//! far it is.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use trustformers_runtime::device;
use trustformers_runtime::failure::Failure;
use trustformers_runtime::load::{Loaded, Loader, OnProgress};
use trustformers_runtime::process::StartError;
use trustformers_runtime::spec::{FetchSpec, ModelSpec, kv_cache_of, numerics_of};
use trustformers_store::{Source, StoreError};

use crate::flags::DeviceFlags;

/// Why flags name no model that can be loaded. The messages hold what they are about already, so it is no
/// source.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelFlagError {
    /// `--model` names nothing that can be read.
    #[error("--model: {0}")]
    Model(StoreError),
    /// `--numerics` is no such word.
    #[error("--numerics: {0}")]
    Numerics(String),
    /// `--kv-cache` is no such word.
    #[error("--kv-cache: {0}")]
    KvCache(String),
}

/// The model that flags name, called by its file's or folder's name, with a server's settings.
pub(crate) fn spec_of(model: &str, device: &DeviceFlags) -> Result<ModelSpec, ModelFlagError> {
    let DeviceFlags { numerics, kv_cache, threads } = device;
    let source = Source::from_str(model).map_err(ModelFlagError::Model)?;
    let name = source.suggested_name().unwrap_or_else(|| "model".to_owned());
    let mut spec = ModelSpec::new(name, source);
    // Without a cache directory only a source that needs one is refused, when it is loaded.
    spec.fetch = FetchSpec::of_user().ok();
    spec.engine.numerics = numerics_of(numerics).map_err(ModelFlagError::Numerics)?;
    spec.engine.kv_cache = kv_cache_of(kv_cache).map_err(ModelFlagError::KvCache)?;
    spec.threads = threads.map(usize::from);
    Ok(spec)
}

/// Why a model is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadingError {
    /// It could not be loaded. The message holds the failure already, so it is no source.
    #[error("{} ({})", .0, .0.reason)]
    Failed(Failure),
    /// The process could not be set up.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Why a file that a flag names cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// It cannot be read.
    #[error("{flag}: {} cannot be read: {cause}", path.display())]
    Unreadable {
        /// The flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said; the message holds it, so it is no source.
        cause: std::io::Error,
    },
    /// It is not text.
    #[error(
        "{flag}: {} is not UTF-8 (byte {at} cannot be read); convert it, for example with iconv",
        path.display()
    )]
    NotUtf8 {
        /// The flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Place of the first wrong byte.
        at: usize,
    },
}

/// The file's bytes as they are, a final newline included.
pub(crate) fn text_of(flag: &'static str, path: &Path) -> Result<String, FileError> {
    let bytes =
        std::fs::read(path).map_err(|cause| FileError::Unreadable { flag, path: path.to_owned(), cause })?;
    String::from_utf8(bytes).map_err(|error| FileError::NotUtf8 {
        flag,
        path: path.to_owned(),
        at: error.utf8_error().valid_up_to(),
    })
}

/// Loads a model, with a bar on stderr where that is a terminal.
pub(crate) async fn load(spec: ModelSpec) -> Result<Loaded, LoadingError> {
    let bar = ProgressBar::new(0);
    bar.set_style(bar_style());
    bar.set_message(spec.name().to_owned());
    let progress: OnProgress = {
        let bar = bar.clone();
        Arc::new(move |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })
    };
    let loader = Loader::new(device::real(), &prometheus::Registry::new()).map_err(StartError::from)?;
    let loading = tokio::task::spawn_blocking(move || loader.load(&spec, &progress));
    let outcome = loading.await.map_err(|error| {
        LoadingError::Failed(Failure::permanent("InternalError", format!("loading broke off: {error}")))
    })?;
    bar.finish_and_clear();
    outcome.map_err(LoadingError::Failed)
}

/// indicatif draws on stderr, and only where that is a terminal.
fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("loading {msg} {wide_bar} {bytes}/{total_bytes} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}
