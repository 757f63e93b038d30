//! Adapters (LoRA) of a model: finding and reading their files before the load, giving them to the engine,
//! and the names by which callers choose them.

use trustformers_engine::{AdapterRoom, MAX_ADAPTER_NAME_BYTES};
use trustformers_model::{Adapter, CheckpointFiles, Model};
use trustformers_proto::Task;
use trustformers_store::Source;

use crate::failure::Failure;
use crate::load::{go_on, wanted_files};
use crate::model_files::{self, Listener, WantedFiles};
use crate::runner::Runner;
use crate::spec::ModelSpec;

/// What stands between the name of a model and that of its adapter: `model:adapter`.
const SEPARATOR: char = ':';

/// The files of an adapter, as PEFT writes them.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// An adapter of a model that generates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSpec {
    /// The name that callers write behind the model's, after a colon, or alone.
    pub name: String,
    /// The folder with its files, as PEFT writes them.
    pub source: Source,
    /// The digest that its files must have.
    pub sha256: Option<String>,
}

impl AdapterSpec {
    /// Checks the names of a model's adapters.
    ///
    /// # Errors
    /// The position of the first name that cannot be used, and why.
    pub fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), (usize, String)> {
        let mut before: Vec<&str> = Vec::new();
        for (index, name) in names.enumerate() {
            if !(1..=MAX_ADAPTER_NAME_BYTES).contains(&name.len()) || name.contains(SEPARATOR) {
                let why = format!("{name:?} must have 1 to {MAX_ADAPTER_NAME_BYTES} bytes and no colon");
                return Err((index, why));
            }
            if before.contains(&name) {
                return Err((index, format!("{name:?} is the name of another adapter of the model")));
            }
            before.push(name);
        }
        Ok(())
    }
}

/// The name by which callers choose an adapter of a model.
pub(crate) fn full_name(model: &str, adapter: &str) -> String {
    format!("{model}{SEPARATOR}{adapter}")
}

/// The names of model and adapter in a name that may be that of an adapter.
pub(crate) fn split_name(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once(SEPARATOR)
}

/// Reads the adapters that a model is to be served with, so that all of them are known to fit before anything
/// is put on a device. None where the model is not wanted any more.
pub(crate) fn read(
    spec: &ModelSpec,
    model: &Model,
    is_wanted: &dyn Fn() -> bool,
) -> Result<Vec<Adapter>, Failure> {
    if !spec.adapters.is_empty() && model.task() != Task::Generate {
        let why = format!(
            "adapters: {} generates no text, and adapters are for models that do; remove them",
            spec.name()
        );
        return Err(Failure::permanent("InvalidConfiguration", why));
    }
    let read = |adapter: &AdapterSpec| {
        read_one(spec, adapter, model, is_wanted).map_err(|failure| Failure {
            message: format!("adapter {}: {}", adapter.name, failure.message),
            ..failure
        })
    };
    spec.adapters.iter().map(read).collect()
}

fn read_one(
    spec: &ModelSpec,
    adapter: &AdapterSpec,
    model: &Model,
    is_wanted: &dyn Fn() -> bool,
) -> Result<Adapter, Failure> {
    let patterns = FILES.map(str::to_owned);
    let sha256 = adapter.sha256.as_deref();
    let wanted = WantedFiles { files: &patterns, sha256, ..wanted_files(spec, &adapter.source) };
    // Its bytes are not those of the model, whose progress is shown.
    let found = model_files::find(&wanted, &Listener { progress: &|_, _| {}, is_wanted })?;
    let files = found.resolved.files().iter().map(|file| (file.name.clone(), file.path.clone()));
    let files = CheckpointFiles::new(found.root.clone(), files);
    Ok(model.read_adapter_while(&adapter.name, &files, &mut |_| go_on(is_wanted))?)
}

/// The room that an engine needs for adapters.
pub(crate) fn room(adapters: &[Adapter]) -> AdapterRoom {
    AdapterRoom { slots: adapters.len(), rank: adapters.iter().map(Adapter::rank).max().unwrap_or(0) }
}

/// Bytes that adapters take at most: until one is on the device, its values are in memory twice.
pub(crate) fn bytes(adapters: &[Adapter]) -> u64 {
    adapters.iter().map(Adapter::bytes).sum::<u64>().saturating_mul(2)
}

/// Gives an engine its adapters. Blocking.
pub(crate) fn put(runner: &Runner, adapters: Vec<Adapter>) -> Result<(), Failure> {
    let Runner::Generate(engine) = runner else { return Ok(()) };
    for adapter in adapters {
        let name = adapter.name.clone();
        engine
            .add_adapter_blocking(adapter)
            .map_err(|error| Failure::permanent("UnsupportedModel", format!("adapter {name}: {error}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_caller_could_write_are_refused() {
        let check = |names: &[&str]| AdapterSpec::check_names(names.iter().copied()).map_err(|(at, _)| at);
        assert_eq!(check(&["sql", "chat.v2", "a/b"]), Ok(()));
        assert_eq!(check(&["sql", ""]), Err(1));
        assert_eq!(check(&["a:b"]), Err(0));
        assert_eq!(check(&["sql", "chat", "sql"]), Err(2));
    }

    #[test]
    fn a_name_is_split_at_its_last_colon() {
        assert_eq!(split_name("llama3:8b:sql"), Some(("llama3:8b", "sql")));
        assert_eq!(split_name("llama3"), None);
        assert_eq!(full_name("llama3:8b", "sql"), "llama3:8b:sql");
    }
}
