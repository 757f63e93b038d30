//! `rollout`: its state, commands to it, its history.
//!
//! A command is an annotation with the revision that it is about, so that one that arrives late changes no
//! other rollout. It is checked here against the state that was read, with the reason if it does not apply;
//! the operator checks it again.

use std::fmt::{self, Display, Formatter};
use std::process::ExitCode;
use std::time::Duration;

use futures::TryStreamExt;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use serde::Serialize;
use serde_json::json;
use tokio::time::timeout;
use trustformers_crds::names::{ABORT_ANNOTATION, PROMOTE_ANNOTATION, UNDO_ANNOTATION};
use trustformers_crds::{
    ConsumedCommands, InferenceModel, InferenceModelStatus, RolloutDecision, RolloutStatus,
};

use crate::args::{HistoryArgs, RolloutCommand, RolloutStatusArgs};
use crate::cluster::{Cluster, CommandError, answered, refused_watch};
use crate::model::rollout_line;
use crate::output;
use crate::table::{Table, one_line};
use crate::text;

/// How long the operator has to follow a command. It looks at a model at once when its annotations change.
const FOLLOW_LIMIT: Duration = Duration::from_secs(15);

/// What is asked of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Skip what remains, or try again.
    Promote,
    /// Return to the stable revision.
    Abort,
    /// Return to the previous revision.
    Undo,
}

impl Request {
    fn annotation(self) -> &'static str {
        match self {
            Self::Promote => PROMOTE_ANNOTATION,
            Self::Abort => ABORT_ANNOTATION,
            Self::Undo => UNDO_ANNOTATION,
        }
    }

    fn consumed(self, commands: &ConsumedCommands) -> Option<&String> {
        match self {
            Self::Promote => commands.promote.as_ref(),
            Self::Abort => commands.abort.as_ref(),
            Self::Undo => commands.undo.as_ref(),
        }
    }
}

impl Display for Request {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Promote => "promote",
            Self::Abort => "abort",
            Self::Undo => "undo",
        })
    }
}

/// Why a command does not apply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The model was never rolled out.
    #[error("there is no rollout: a change of the source or of the engine's settings starts one")]
    NoRollout,
    /// Nothing can be promoted.
    #[error("there is nothing to promote: the rollout is {phase}")]
    NothingToPromote {
        /// Where the rollout is.
        phase: String,
    },
    /// Nothing can be aborted.
    #[error("there is nothing to abort: the rollout is {phase}")]
    NothingToAbort {
        /// Where the rollout is.
        phase: String,
    },
    /// The revision is promoted already.
    #[error(
        "the revision is promoted already: `kubectl trustformers rollout undo` returns to the previous one"
    )]
    Promoted,
    /// No revision has served yet.
    #[error("no revision has served yet, so there is none to return to: change the spec instead")]
    NoStable,
    /// The previous revision is gone.
    #[error(
        "the previous revision is no longer ready (the rollout is {phase}; it can be undone during spec.rollout.bake): \
         apply the earlier spec, which is rolled out as a revision"
    )]
    NoPrevious {
        /// Where the rollout is.
        phase: String,
    },
}

/// The revision that a command is about in this state.
///
/// # Errors
/// Why the command does not apply.
pub fn revision_for(request: Request, status: &InferenceModelStatus) -> Result<&str, Refusal> {
    let rollout = status.rollout.as_ref().ok_or(Refusal::NoRollout)?;
    let phase = || rollout.phase.clone();
    let stable = status.stable.as_ref().map(|one| one.revision.as_str());
    let candidate = status.candidate.as_ref().map(|one| one.revision.as_str());
    let baking = stable.filter(|_| rollout.phase == "Promoted");
    match request {
        Request::Promote => candidate
            .or(baking)
            .or(rollout.refused.as_deref())
            .ok_or_else(|| Refusal::NothingToPromote { phase: phase() }),
        Request::Abort => match candidate {
            Some(_) if stable.is_none() => Err(Refusal::NoStable),
            Some(candidate) => Ok(candidate),
            None if baking.is_some() => Err(Refusal::Promoted),
            None => Err(Refusal::NothingToAbort { phase: phase() }),
        },
        Request::Undo => {
            baking.filter(|_| status.previous.is_some()).ok_or_else(|| Refusal::NoPrevious { phase: phase() })
        }
    }
}

/// The state of a rollout.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RolloutPage {
    name: String,
    stable: Option<String>,
    previous: Option<String>,
    candidate: Option<String>,
    weight: Option<u32>,
    /// The rollout as the status has it; none of a model that was never rolled out.
    rollout: Option<RolloutStatus>,
    #[serde(skip)]
    line: Option<String>,
}

impl RolloutPage {
    /// The state of a model's rollout.
    #[must_use]
    pub fn of(model: &InferenceModel, now: Timestamp) -> Self {
        let empty = InferenceModelStatus::default();
        let status = model.status.as_ref().unwrap_or(&empty);
        Self {
            name: model.metadata.name.clone().unwrap_or_default(),
            stable: status.stable.as_ref().map(|one| one.revision.clone()),
            previous: status.previous.as_ref().map(|one| one.revision.clone()),
            candidate: status.candidate.as_ref().map(|one| one.revision.clone()),
            weight: status.candidate.as_ref().map(|one| one.weight),
            rollout: status.rollout.clone(),
            line: rollout_line(status, model.spec.rollout.steps.len(), now),
        }
    }

    /// The state as text.
    #[must_use]
    pub fn text(&self) -> String {
        let Some(line) = &self.line else {
            let stable = self.stable.as_deref().unwrap_or("none yet");
            return format!("{}: no rollout so far; stable revision {stable}\n", self.name);
        };
        let mut page = format!("{}: {}\n", self.name, one_line(line));
        let mut add = |name: &str, value: &Option<String>, rest: String| {
            if let Some(value) = value {
                page.push_str(&format!("  {name:<10} {value}{rest}\n"));
            }
        };
        add("stable", &self.stable, String::new());
        let share = self.weight.map(|weight| format!("   {weight} % of the requests")).unwrap_or_default();
        add("candidate", &self.candidate, share);
        add("previous", &self.previous, "   ready for an undo".to_owned());
        let refused = self.rollout.as_ref().and_then(|rollout| rollout.refused.clone());
        add("refused", &refused, "   `rollout promote` tries it again".to_owned());
        page
    }

    /// Whether the rollout has ended well, badly, or not yet.
    fn ended(&self) -> Option<bool> {
        let rollout = self.rollout.as_ref()?;
        match rollout.phase.as_str() {
            _ if rollout.held => Some(false),
            "Done" => Some(true),
            "RolledBack" => Some(false),
            _ => None,
        }
    }
}

/// The decisions of a model's rollouts as a table, the newest first.
#[must_use]
pub fn history_text(history: &[RolloutDecision]) -> String {
    let mut table = Table::new(&["TIME", "REVISION", "DECISION", "REASON", "MESSAGE"]);
    for one in history {
        let cells = [&one.revision, &one.decision, &one.reason, &one.message].map(Clone::clone);
        table.row(std::iter::once(text::time(one.time.0)).chain(cells));
    }
    if table.is_empty() { "no decisions so far\n".to_owned() } else { table.text() }
}

/// Runs a command about a rollout.
///
/// # Errors
/// When a request fails, or the command does not apply.
pub async fn run(cluster: &Cluster, command: RolloutCommand) -> Result<ExitCode, CommandError> {
    match command {
        RolloutCommand::Status(args) => state(cluster, args).await,
        RolloutCommand::Promote(args) => follow(cluster, Request::Promote, &args.name).await,
        RolloutCommand::Abort(args) => follow(cluster, Request::Abort, &args.name).await,
        RolloutCommand::Undo(args) => follow(cluster, Request::Undo, &args.name).await,
        RolloutCommand::History(HistoryArgs { name, format }) => {
            let mut history = cluster.model(&name).await?.status.unwrap_or_default().history;
            history.reverse();
            output::print(format.output, &history, |history| history_text(history))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn state(cluster: &Cluster, args: RolloutStatusArgs) -> Result<ExitCode, CommandError> {
    let RolloutStatusArgs { name, watch, format } = args;
    let model = cluster.model(&name).await?;
    if !watch {
        output::print(format.output, &RolloutPage::of(&model, Timestamp::now()), RolloutPage::text)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut screen = output::Screen::default();
    let ended = until(cluster, &name, |model| {
        let page = RolloutPage::of(model, Timestamp::now());
        screen.show(&page.text())?;
        // A change that the operator has not looked at yet may start another rollout.
        let status = model.status.as_ref();
        let is_current = status.is_some_and(|status| status.observed_generation == model.metadata.generation);
        Ok(page.ended().filter(|_| is_current))
    });
    Ok(if ended.await? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn follow(cluster: &Cluster, request: Request, name: &str) -> Result<ExitCode, CommandError> {
    let model = cluster.model(name).await?;
    let revision = revision_for(request, &model.status.unwrap_or_default())?.to_owned();
    // Another number than any before: the same command may be repeated.
    let text = format!("{revision}/{}", Timestamp::now().as_millisecond());
    let patch = Patch::Merge(json!({"metadata": {"annotations": {request.annotation(): text}}}));
    let what = format!("{request} of InferenceModel {name}");
    let models = cluster.api::<InferenceModel>();
    answered(&what, models.patch(name, &PatchParams::default(), &patch)).await?;
    let followed = until(cluster, name, |model| {
        let rollout = model.status.as_ref().and_then(|status| status.rollout.as_ref());
        let consumed = rollout.and_then(|rollout| request.consumed(&rollout.consumed));
        Ok((consumed == Some(&text)).then(|| RolloutPage::of(model, Timestamp::now()).text()))
    });
    let Ok(followed) = timeout(FOLLOW_LIMIT, followed).await else {
        return Err(CommandError::Nothing(format!(
            "{request} of revision {revision} is written, but the operator has not followed it within {} s: \
             `kubectl trustformers doctor` says whether it runs",
            FOLLOW_LIMIT.as_secs()
        )));
    };
    output::write(&format!("{request} of revision {revision}\n{}", followed?))?;
    Ok(ExitCode::SUCCESS)
}

/// Watches a model until `look` finds something in it.
async fn until<T>(
    cluster: &Cluster,
    name: &str,
    mut look: impl FnMut(&InferenceModel) -> Result<Option<T>, CommandError>,
) -> Result<T, CommandError> {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let what = format!("InferenceModel {name}");
    // Transient errors are tried again by the backoff; a model that is gone is never there again.
    let mut models = std::pin::pin!(watcher(cluster.api::<InferenceModel>(), config).default_backoff());
    loop {
        match models.try_next().await {
            Ok(Some(watcher::Event::Apply(model) | watcher::Event::InitApply(model))) => {
                if let Some(found) = look(&model)? {
                    return Ok(found);
                }
            }
            Ok(Some(watcher::Event::Init | watcher::Event::InitDone)) => {}
            Ok(Some(watcher::Event::Delete(_)) | None) => {
                return Err(CommandError::Nothing(format!("{what} was deleted")));
            }
            Err(cause) => refused_watch(&what, cause)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{now, shifting};

    fn status(yaml: &str) -> InferenceModelStatus {
        let since = "2026-12-01T00:00:00Z";
        let yaml = yaml.replace("ROLLOUT", &format!("placement: Surge, since: {since}, base: 1, attempt: 1"));
        serde_yaml::from_str(&yaml.replace("CANDIDATE", &format!("weight: 5, step: 0, since: {since}")))
            .unwrap()
    }

    #[test]
    fn a_command_is_about_the_revision_of_its_state() {
        let shifting = status(
            "{stable: {revision: r1}, candidate: {revision: r2, CANDIDATE}, rollout: {phase: Shifting, ROLLOUT}}",
        );
        assert_eq!(revision_for(Request::Promote, &shifting), Ok("r2"));
        assert_eq!(revision_for(Request::Abort, &shifting), Ok("r2"));
        let baking =
            status("{stable: {revision: r2}, previous: {revision: r1}, rollout: {phase: Promoted, ROLLOUT}}");
        assert_eq!(revision_for(Request::Undo, &baking), Ok("r2"));
        assert_eq!(revision_for(Request::Promote, &baking), Ok("r2"));
        assert_eq!(revision_for(Request::Abort, &baking), Err(Refusal::Promoted));
        let refused = status("{stable: {revision: r1}, rollout: {phase: RolledBack, refused: r2, ROLLOUT}}");
        assert_eq!(revision_for(Request::Promote, &refused), Ok("r2"));
    }

    #[test]
    fn a_command_that_does_not_apply_says_what_to_do() {
        let done = status("{stable: {revision: r1}, rollout: {phase: Done, ROLLOUT}}");
        let refusal = |request| revision_for(request, &done).unwrap_err().to_string();
        assert_eq!(refusal(Request::Promote), "there is nothing to promote: the rollout is Done");
        assert_eq!(refusal(Request::Abort), "there is nothing to abort: the rollout is Done");
        assert!(
            refusal(Request::Undo).ends_with("apply the earlier spec, which is rolled out as a revision")
        );
        let first = status("{candidate: {revision: r1, CANDIDATE}, rollout: {phase: Loading, ROLLOUT}}");
        assert_eq!(revision_for(Request::Abort, &first), Err(Refusal::NoStable));
        assert_eq!(revision_for(Request::Undo, &InferenceModelStatus::default()), Err(Refusal::NoRollout));
    }

    #[test]
    fn the_state_names_revisions_and_what_it_waits_for() {
        insta::assert_snapshot!(RolloutPage::of(&shifting(), now()).text());
        let mut never = shifting();
        never.status.as_mut().unwrap().rollout = None;
        assert_eq!(
            RolloutPage::of(&never, now()).text(),
            "chat: no rollout so far; stable revision 3f2a9c1d\n"
        );
    }

    #[test]
    fn a_watch_ends_when_the_rollout_does() {
        let ended = |phase: &str, held: bool| {
            let mut model = shifting();
            let rollout = model.status.as_mut().and_then(|status| status.rollout.as_mut()).unwrap();
            (rollout.phase, rollout.held) = (phase.to_owned(), held);
            RolloutPage::of(&model, now()).ended()
        };
        assert_eq!(ended("Shifting", false), None);
        assert_eq!(ended("Promoted", false), None);
        assert_eq!(ended("Done", false), Some(true));
        assert_eq!(ended("RolledBack", false), Some(false));
        assert_eq!(ended("Shifting", true), Some(false));
    }

    #[test]
    fn the_history_has_reasons_and_figures() {
        let mut history = shifting().status.unwrap().history;
        history.reverse();
        insta::assert_snapshot!(history_text(&history));
        assert_eq!(history_text(&[]), "no decisions so far\n");
    }
}
