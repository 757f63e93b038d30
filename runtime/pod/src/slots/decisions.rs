//! What a request to load, swap, roll back or unload means for the two slots of a model.
//!
//! Every decision gives the same result when the request is sent again, because callers that lose a
//! connection do not know whether their request arrived.

use trustformers_api::http::state_word;
use trustformers_proto::v1::{ModelState, SlotRole};

/// What is decided by, of the version in one slot. A model's current version comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotFacts<'a> {
    pub(crate) role: SlotRole,
    pub(crate) state: ModelState,
    pub(crate) revision: &'a str,
    /// Empty until known.
    pub(crate) digest: &'a str,
    /// Whether it is, or was, loaded with the settings of the request. Only a load asks.
    pub(crate) same_settings: bool,
}

/// Which version of a model is meant; what is left out matches all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VersionFilter {
    /// Its digest.
    pub digest: Option<String>,
    /// Its revision.
    pub revision: Option<String>,
}

/// The version that a swap is to put in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwapTarget {
    /// A version that is loaded beside the current one.
    Version(VersionFilter),
    /// The only version of another model.
    OtherModel(String),
}

/// Why the slots of a model stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The load names no revision, or one that is loaded with other settings.
    #[error(
        "revision {revision:?} is loaded already from another source or with other settings; load it under \
         another revision"
    )]
    RevisionTaken {
        /// The revision.
        revision: String,
    },
    /// Both slots are in use, and nobody asked for the end of either version.
    #[error(
        "both slots are in use: revision {revision:?} is {} and was not swapped in yet; swap it in, or unload it",
        state_word(*state)
    )]
    SlotTaken {
        /// The revision in the second slot.
        revision: String,
        /// Its state.
        state: ModelState,
    },
    /// No slot holds the version.
    #[error("the version {version} is not loaded; loaded are: {loaded}")]
    NotLoaded {
        /// What was asked for.
        version: String,
        /// What is loaded.
        loaded: String,
    },
    /// The version cannot answer.
    #[error("the version is {} and cannot answer; see its state", state_word(*state))]
    NotReady {
        /// Its state.
        state: ModelState,
    },
    /// Another version answers than the request expects.
    #[error(
        "the digest that answers is {found}, and {expected} is expected; look at the model and ask again"
    )]
    Changed {
        /// The digest that was expected.
        expected: String,
        /// The digest of the current version.
        found: String,
    },
    /// There is no version to go back to.
    #[error("no version before the current one is loaded; load it, and swap it in")]
    NothingBefore,
    /// The version answers for the model.
    #[error("the version answers for the model; swap the other one in first, or unload the model as a whole")]
    Answers,
    /// The other model of a swap does something else.
    #[error("{name} does the task {found}, and this model the task {task}; callers would be refused")]
    OtherTask {
        /// The other model.
        name: String,
        /// Its task.
        found: &'static str,
        /// The task of the model.
        task: &'static str,
    },
    /// The other model of a swap has versions of its own to keep.
    #[error("{name} holds two versions; unload one of them first")]
    OtherModelHasTwo {
        /// The other model.
        name: String,
    },
}

/// What a load does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoadDecision {
    /// The version in this slot is what is asked for; its load is waited for.
    Join(usize),
    /// The second slot is free.
    Load,
    /// The version in the second slot ends first.
    Replace,
}

/// What a swap does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SwapDecision {
    /// The version answers already.
    Already,
    /// The two slots change their roles.
    Swap,
}

/// What a rollback does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RollbackDecision {
    /// It was done already.
    Already,
    /// The two slots change their roles.
    Swap,
}

/// What an unload does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UnloadDecision {
    /// The whole model ends.
    Model,
    /// The version in the second slot ends.
    Second,
    /// No such version is there any more.
    Gone,
}

impl VersionFilter {
    /// Whether nothing is left out.
    pub(crate) fn is_empty(&self) -> bool {
        self.digest.is_none() && self.revision.is_none()
    }

    fn fits(&self, slot: &SlotFacts<'_>) -> bool {
        // A digest of 64 digits may be written in either case.
        let digest = self.digest.as_ref().is_none_or(|digest| digest.eq_ignore_ascii_case(slot.digest));
        let revision = self.revision.as_ref().is_none_or(|revision| revision == slot.revision);
        digest && revision
    }

    fn describe(&self) -> String {
        let digest = self.digest.iter().map(|digest| format!("with the digest {digest}"));
        let revision = self.revision.iter().map(|revision| format!("of revision {revision:?}"));
        digest.chain(revision).collect::<Vec<_>>().join(" ")
    }
}

/// # Errors
/// Both slots are in use, or the revision stands for something else.
pub(crate) fn decide_load(slots: &[SlotFacts<'_>], revision: &str) -> Result<LoadDecision, Refusal> {
    let Some(index) = slots.iter().position(|slot| slot.revision == revision) else {
        return decide_beside(slots);
    };
    let slot = &slots[index];
    match (slot.state, index) {
        // What failed keeps nothing, so that another attempt may have its slot.
        (ModelState::Failed, 1..) => Ok(LoadDecision::Replace),
        _ if !slot.same_settings => Err(Refusal::RevisionTaken { revision: revision.to_owned() }),
        _ => Ok(LoadDecision::Join(index)),
    }
}

/// As [`decide_load`], of a version that neither slot holds.
///
/// # Errors
/// Both slots are in use.
pub(crate) fn decide_beside(slots: &[SlotFacts<'_>]) -> Result<LoadDecision, Refusal> {
    let Some(second) = slots.get(1) else { return Ok(LoadDecision::Load) };
    let replaceable = matches!(second.role, SlotRole::Previous | SlotRole::RolledBack)
        || matches!(second.state, ModelState::Failed | ModelState::Draining);
    if replaceable {
        return Ok(LoadDecision::Replace);
    }
    Err(Refusal::SlotTaken { revision: second.revision.to_owned(), state: second.state })
}

/// The slot that holds a version.
///
/// # Errors
/// No slot does.
pub(crate) fn find_version(slots: &[SlotFacts<'_>], wanted: &VersionFilter) -> Result<usize, Refusal> {
    let found = slots.iter().position(|slot| wanted.fits(slot));
    found.ok_or_else(|| Refusal::NotLoaded { version: wanted.describe(), loaded: list(slots) })
}

/// # Errors
/// The version in slot `wanted` is not ready, or another one answers than is expected.
pub(crate) fn decide_swap(
    slots: &[SlotFacts<'_>],
    wanted: usize,
    expected_digest: Option<&str>,
) -> Result<SwapDecision, Refusal> {
    if wanted == 0 {
        return Ok(SwapDecision::Already);
    }
    check_expected(slots, expected_digest)?;
    check_ready(&slots[wanted])?;
    Ok(SwapDecision::Swap)
}

/// Whether the only version of another model, `other`, may become the current one.
///
/// # Errors
/// It is not ready, another version answers than is expected, or the second slot is in use.
pub(crate) fn check_take_over(
    slots: &[SlotFacts<'_>],
    other: &SlotFacts<'_>,
    expected_digest: Option<&str>,
) -> Result<(), Refusal> {
    check_expected(slots, expected_digest)?;
    check_ready(other)?;
    decide_beside(slots).map(|_| ())
}

/// # Errors
/// There is nothing to go back to, or another version answers than is expected.
pub(crate) fn decide_rollback(
    slots: &[SlotFacts<'_>],
    expected_digest: Option<&str>,
) -> Result<RollbackDecision, Refusal> {
    let second = slots.get(1);
    if let (Err(changed), Some(expected)) = (check_expected(slots, expected_digest), expected_digest) {
        let done = |slot: &SlotFacts<'_>| {
            slot.role == SlotRole::RolledBack && slot.digest.eq_ignore_ascii_case(expected)
        };
        return if second.is_some_and(done) { Ok(RollbackDecision::Already) } else { Err(changed) };
    }
    match second {
        Some(slot) if slot.role == SlotRole::Previous => {
            check_ready(slot)?;
            Ok(RollbackDecision::Swap)
        }
        _ => Err(Refusal::NothingBefore),
    }
}

/// # Errors
/// The version answers, and another one is loaded beside it.
pub(crate) fn decide_unload(
    slots: &[SlotFacts<'_>],
    meant: &VersionFilter,
) -> Result<UnloadDecision, Refusal> {
    if meant.is_empty() {
        return Ok(UnloadDecision::Model);
    }
    // The second one first: where both have one digest, the model goes on answering.
    match slots.iter().rposition(|slot| meant.fits(slot)) {
        Some(0) if slots.len() == 1 => Ok(UnloadDecision::Model),
        Some(0) => Err(Refusal::Answers),
        Some(_) => Ok(UnloadDecision::Second),
        None => Ok(UnloadDecision::Gone),
    }
}

fn check_expected(slots: &[SlotFacts<'_>], expected: Option<&str>) -> Result<(), Refusal> {
    let found = slots.first().map_or("", |slot| slot.digest);
    match expected {
        Some(expected) if !expected.eq_ignore_ascii_case(found) => {
            Err(Refusal::Changed { expected: expected.to_owned(), found: found.to_owned() })
        }
        _ => Ok(()),
    }
}

fn check_ready(slot: &SlotFacts<'_>) -> Result<(), Refusal> {
    match slot.state {
        ModelState::Ready => Ok(()),
        state => Err(Refusal::NotReady { state }),
    }
}

/// The versions that are loaded, for people.
fn list(slots: &[SlotFacts<'_>]) -> String {
    let describe = |slot: &SlotFacts<'_>| {
        let digest = if slot.digest.is_empty() { "of an unknown digest" } else { slot.digest };
        match slot.revision {
            "" => digest.to_owned(),
            revision => format!("{revision:?} ({digest})"),
        }
    };
    slots.iter().map(describe).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ModelState::{Draining, Failed, Loading, Pending, Ready, Warming};
    use SlotRole::{Candidate, Current, Previous, RolledBack};

    fn slot<'a>(role: SlotRole, state: ModelState, revision: &'a str, digest: &'a str) -> SlotFacts<'a> {
        SlotFacts { role, state, revision, digest, same_settings: true }
    }

    const CURRENT: SlotFacts<'static> =
        SlotFacts { role: Current, state: Ready, revision: "r1", digest: "d1", same_settings: true };

    /// A swap by digest.
    fn swap(slots: &[SlotFacts<'_>], digest: &str, expected: Option<&str>) -> Result<SwapDecision, Refusal> {
        decide_swap(slots, find_version(slots, &of_digest(digest))?, expected)
    }

    fn of_digest(digest: &str) -> VersionFilter {
        VersionFilter { digest: Some(digest.to_owned()), revision: None }
    }

    #[test]
    fn a_load_takes_the_free_slot_or_that_of_a_version_that_nobody_needs() {
        assert_eq!(decide_load(&[CURRENT], "r2"), Ok(LoadDecision::Load));
        for (role, state, wanted) in [
            (Previous, Ready, Ok(LoadDecision::Replace)),
            (RolledBack, Ready, Ok(LoadDecision::Replace)),
            (Candidate, Failed, Ok(LoadDecision::Replace)),
            (Candidate, Draining, Ok(LoadDecision::Replace)),
            (Candidate, Ready, Err(Refusal::SlotTaken { revision: "r2".into(), state: Ready })),
            (Candidate, Loading, Err(Refusal::SlotTaken { revision: "r2".into(), state: Loading })),
        ] {
            let slots = [CURRENT, slot(role, state, "r2", "d2")];
            assert_eq!(decide_load(&slots, "r3"), wanted, "{role:?} {state:?}");
        }
    }

    #[test]
    fn a_load_that_is_sent_again_joins_the_first_one() {
        for state in [Pending, Loading, Warming, Ready] {
            let slots = [CURRENT, slot(Candidate, state, "r2", "")];
            assert_eq!(decide_load(&slots, "r2"), Ok(LoadDecision::Join(1)), "{state:?}");
            assert_eq!(decide_load(&slots, "r1"), Ok(LoadDecision::Join(0)));
            let other = SlotFacts { same_settings: false, ..slots[1] };
            let refused = decide_load(&[CURRENT, other], "r2").unwrap_err();
            assert_eq!(refused, Refusal::RevisionTaken { revision: "r2".into() });
        }
        let failed = [CURRENT, slot(Candidate, Failed, "r2", "")];
        assert_eq!(decide_load(&failed, "r2"), Ok(LoadDecision::Replace), "it is tried again");
    }

    #[test]
    fn a_swap_needs_a_version_that_is_ready_and_the_one_that_is_expected() {
        for state in [Pending, Loading, Warming, Draining, Failed] {
            let slots = [CURRENT, slot(Candidate, state, "r2", "d2")];
            assert_eq!(swap(&slots, "d2", None), Err(Refusal::NotReady { state }));
        }
        let slots = [CURRENT, slot(Candidate, Ready, "r2", "d2")];
        for expected in [None, Some("d1"), Some("D1")] {
            assert_eq!(swap(&slots, "D2", expected), Ok(SwapDecision::Swap));
        }
        let changed = Refusal::Changed { expected: "d0".into(), found: "d1".into() };
        assert_eq!(swap(&slots, "d2", Some("d0")), Err(changed));
        let missing = swap(&slots, "d3", None).unwrap_err().to_string();
        assert!(missing.contains("digest d3") && missing.contains("\"r1\" (d1), \"r2\" (d2)"), "{missing}");
        let by_revision = VersionFilter { digest: None, revision: Some("r2".into()) };
        assert_eq!(find_version(&slots, &by_revision), Ok(1));
    }

    #[test]
    fn swaps_and_rollbacks_that_are_sent_again_change_nothing() {
        // The slots after a swap from d1 to d2.
        let swapped = [slot(Current, Ready, "r2", "d2"), slot(Previous, Ready, "r1", "d1")];
        assert_eq!(swap(&swapped, "d2", Some("d1")), Ok(SwapDecision::Already));
        assert_eq!(decide_rollback(&swapped, Some("d2")), Ok(RollbackDecision::Swap));
        assert_eq!(decide_rollback(&swapped, None), Ok(RollbackDecision::Swap));
        let undone = [CURRENT, slot(RolledBack, Ready, "r2", "d2")];
        assert_eq!(decide_rollback(&undone, Some("d2")), Ok(RollbackDecision::Already));
        assert_eq!(decide_rollback(&undone, None), Err(Refusal::NothingBefore), "it would swap d2 in again");
        assert!(matches!(decide_rollback(&undone, Some("d9")), Err(Refusal::Changed { .. })));
        for slots in [&[CURRENT][..], &[CURRENT, slot(Candidate, Ready, "r2", "d2")]] {
            assert_eq!(decide_rollback(slots, None), Err(Refusal::NothingBefore));
        }
        let ending = [CURRENT, slot(Previous, Draining, "r0", "d0")];
        assert_eq!(decide_rollback(&ending, None), Err(Refusal::NotReady { state: Draining }));
    }

    #[test]
    fn another_model_takes_over_only_where_no_candidate_is_lost() {
        let other = slot(Current, Ready, "", "d2");
        assert_eq!(check_take_over(&[CURRENT], &other, Some("d1")), Ok(()));
        let previous = [CURRENT, slot(Previous, Ready, "r0", "d0")];
        assert_eq!(check_take_over(&previous, &other, None), Ok(()));
        let candidate = [CURRENT, slot(Candidate, Ready, "r3", "d3")];
        assert!(matches!(check_take_over(&candidate, &other, None), Err(Refusal::SlotTaken { .. })));
        let loading = slot(Current, Loading, "", "");
        assert_eq!(check_take_over(&[CURRENT], &loading, None), Err(Refusal::NotReady { state: Loading }));
        assert!(matches!(check_take_over(&[CURRENT], &other, Some("d9")), Err(Refusal::Changed { .. })));
    }

    #[test]
    fn an_unload_of_one_version_never_ends_the_one_that_answers_beside_it() {
        let slots = [CURRENT, slot(Previous, Ready, "r0", "d0")];
        assert_eq!(decide_unload(&slots, &VersionFilter::default()), Ok(UnloadDecision::Model));
        assert_eq!(decide_unload(&slots, &of_digest("d0")), Ok(UnloadDecision::Second));
        assert_eq!(decide_unload(&slots, &of_digest("d1")), Err(Refusal::Answers));
        assert_eq!(decide_unload(&slots[..1], &of_digest("d1")), Ok(UnloadDecision::Model));
        assert_eq!(decide_unload(&slots, &of_digest("d7")), Ok(UnloadDecision::Gone));
        let twins = [CURRENT, slot(Candidate, Ready, "r2", "d1")];
        assert_eq!(decide_unload(&twins, &of_digest("d1")), Ok(UnloadDecision::Second));
    }
}
