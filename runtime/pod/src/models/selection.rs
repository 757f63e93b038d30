//! Which version of which model answers a request: by name, revision and task.

use std::sync::Arc;

use trustformers_api::ApiError;
use trustformers_proto::Task;
use trustformers_proto::v1::ModelState;

use super::ModelServer;
use crate::adapters::full_name;
use crate::generate::RETRY_AFTER_S;
use crate::inflight::InflightGuard;
use crate::lifecycle::{ManagedModel, Serving};
use crate::model_table::{NamedModel, ServedModel};
use crate::status::describe;

/// What a request says of the model that is to answer.
pub(super) struct Asked<'a> {
    pub(super) model: Option<&'a str>,
    pub(super) revision: Option<&'a str>,
    pub(super) task: Task,
}

/// What the name of a request stands for.
struct FoundModel {
    named: NamedModel,
    adapter: Option<String>,
}

/// A model that a request asks.
pub(super) struct AcquiredModel {
    /// The name that the answer carries.
    pub(super) name: String,
    /// The version that answers.
    pub(super) version: Arc<ManagedModel>,
    pub(super) serving: Arc<Serving>,
    /// The adapter that answers, which its version has.
    pub(super) adapter: Option<String>,
    /// The request is in flight until this is dropped.
    pub(super) busy: InflightGuard,
}

impl ModelServer {
    /// The model that is asked for by name, and its adapter where the name is that of one; without a name as
    /// [`Self::only`].
    fn find(&self, asked: Option<&str>, task: Task) -> Result<FoundModel, ApiError> {
        let Some(name) = asked else { return Ok(FoundModel { named: self.only(task)?, adapter: None }) };
        match self.table.snapshot().resolve(name) {
            Some((named, adapter)) => Ok(FoundModel { named, adapter }),
            None => Err(self.unknown(name)),
        }
    }

    fn unknown(&self, asked: &str) -> ApiError {
        ApiError::UnknownModel { asked: asked.to_owned(), choices: self.table.snapshot().choices() }
    }

    /// The only model there is, or the only one of this task.
    fn only(&self, task: Task) -> Result<NamedModel, ApiError> {
        let models = self.table.snapshot();
        let any_version = |model: &Arc<ServedModel>| NamedModel { model: Arc::clone(model), version: None };
        // Whatever the only one does, its own error is the best answer.
        if let [only] = models.models() {
            return Ok(any_version(only));
        }
        let mut meant = Vec::new();
        let mut unknown = None;
        for model in models.models() {
            let status = self.statuses().status(model.current.id);
            if Task::from_wire(&status.task) == Some(task) {
                meant.push(model);
            } else if status.task.is_empty() && status.state() != ModelState::Failed {
                // The task of a model is known once it is loaded; until then the request may mean this model.
                let message = format!("{}; name the model, or ask again", describe(&status));
                let error = ApiError::Unavailable { message, retry_after_s: Some(RETRY_AFTER_S) };
                if !self.table.joined_later(model) {
                    return Err(error);
                }
                // Callers that name no model keep being answered while somebody adds another one.
                unknown = Some(error);
            }
        }
        match (&meant[..], unknown) {
            ([one], _) => Ok(any_version(one)),
            ([], Some(error)) => Err(error),
            ([], None) => Err(ApiError::ModelRequired { choices: models.choices() }),
            _ => {
                let choices = meant.iter().map(|model| model.name().to_owned()).collect();
                Err(ApiError::ModelRequired { choices })
            }
        }
    }

    /// The version that answers whatever model and revision are asked for: the only one of the only model.
    pub(super) fn only_version(&self) -> Option<Arc<ManagedModel>> {
        let models = self.table.snapshot();
        let [only] = models.models() else { return None };
        only.second.is_none().then(|| Arc::clone(&only.current))
    }

    /// The version that is asked for, with its engine. It answers the whole request, whatever is swapped
    /// meanwhile. The request is in flight until the guard is dropped.
    pub(super) fn acquire(&self, asked: &Asked<'_>) -> Result<AcquiredModel, ApiError> {
        loop {
            let FoundModel { named, adapter } = self.find(asked.model, asked.task)?;
            let version = version_of(&named, asked.revision)?;
            // Versions may have different adapters.
            let has = |name: &String| version.spec.adapters.iter().any(|adapter| adapter.name == *name);
            if adapter.as_ref().is_some_and(|name| !has(name)) {
                return Err(self.unknown(asked.model.unwrap_or_default()));
            }
            let busy = version.inflight().register();
            // It is counted first and looked at afterwards; an unload does it the other way round. So it
            // waits for this request, or this request sees it: then a table without the version is in force.
            if !version.is_retired() {
                let serving = self.serving(&version)?;
                let model = named.model.name();
                let name = adapter.as_ref().map_or_else(|| model.to_owned(), |own| full_name(model, own));
                return Ok(AcquiredModel { name, version, serving, adapter, busy });
            }
        }
    }

    /// The engine of a version that serves now. A draining one still serves: routers learn of it later than
    /// this.
    fn serving(&self, version: &ManagedModel) -> Result<Arc<Serving>, ApiError> {
        version.answering().ok_or_else(|| {
            let status = self.statuses().status(version.id);
            let may_pass = status.state() != ModelState::Failed;
            let message = describe(&status);
            ApiError::Unavailable { message, retry_after_s: may_pass.then_some(RETRY_AFTER_S) }
        })
    }
}

/// The version of a model that answers a request for a revision, or for none.
fn version_of(found: &NamedModel, revision: Option<&str>) -> Result<Arc<ManagedModel>, ApiError> {
    let NamedModel { model, version } = found;
    let mut candidates: Vec<&Arc<ManagedModel>> = match version {
        Some(version) => vec![version],
        None => model.versions().collect(),
    };
    let Some(asked) = revision else { return Ok(Arc::clone(candidates[0])) };
    candidates.retain(|version| version.spec.revision == asked);
    match candidates.first() {
        Some(version) => Ok(Arc::clone(version)),
        None => {
            let loaded: Vec<&str> = model.versions().map(|version| version.spec.revision.as_str()).collect();
            let (model, asked) = (model.name().to_owned(), asked.to_owned());
            Err(ApiError::UnknownRevision { model, asked, loaded: loaded.join(", ") })
        }
    }
}
