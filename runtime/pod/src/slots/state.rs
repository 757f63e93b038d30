//! The states of one version, and which may follow which.

use trustformers_proto::v1::ModelState;

/// Whether a version that is in a state may enter another one. A state follows itself: another attempt to
/// load is no news. What arrives late, such as the end of a load after the version was unloaded, changes
/// nothing.
pub(crate) fn may_follow(state: ModelState, next: ModelState) -> bool {
    use ModelState::{Draining, Failed, Loading, Pending, Ready, Unloaded, Unspecified, Warming};
    if state == next {
        return state != Unspecified;
    }
    match next {
        Unspecified => false,
        // A failure may be tried again, and so may a load that broke off.
        Pending => matches!(state, Failed | Loading | Warming),
        Loading => matches!(state, Pending | Failed | Warming),
        Warming => state == Loading,
        Ready => state == Warming,
        Failed => matches!(state, Pending | Loading | Warming),
        Draining => matches!(state, Pending | Loading | Warming | Ready | Failed),
        Unloaded => matches!(state, Draining | Failed | Pending),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ModelState::{Draining, Failed, Loading, Pending, Ready, Unloaded, Unspecified, Warming};
    use std::collections::BTreeSet;

    const ALL: [ModelState; 8] = [Unspecified, Pending, Loading, Warming, Ready, Draining, Unloaded, Failed];

    /// The states that can be reached from one, in any number of steps.
    fn reachable(from: ModelState) -> BTreeSet<ModelState> {
        let mut found = BTreeSet::from([from]);
        // A path without repetitions has at most as many steps as there are states.
        for _ in ALL {
            let next =
                |state: &ModelState| ALL.into_iter().filter(|next| may_follow(*state, *next)).collect();
            let further: Vec<Vec<ModelState>> = found.iter().map(next).collect();
            found.extend(further.into_iter().flatten());
        }
        found
    }

    #[test]
    fn a_version_serves_only_after_it_was_loaded_and_warmed_up() {
        assert!(ALL.into_iter().filter(|state| may_follow(*state, Ready)).eq([Warming, Ready]));
        assert!(ALL.into_iter().filter(|state| may_follow(*state, Warming)).eq([Loading, Warming]));
    }

    #[test]
    fn an_end_is_final_and_can_always_be_reached() {
        assert_eq!(reachable(Unloaded), BTreeSet::from([Unloaded]));
        assert_eq!(reachable(Draining), BTreeSet::from([Draining, Unloaded]));
        for state in [Pending, Loading, Warming, Ready, Failed] {
            assert!(reachable(state).contains(&Unloaded), "{state:?}");
        }
        assert!(!reachable(Ready).contains(&Failed) && !reachable(Ready).contains(&Loading));
    }

    #[test]
    fn a_failure_may_be_tried_again() {
        assert!(reachable(Failed).contains(&Ready));
        assert!(ALL.into_iter().all(|next| !may_follow(Unspecified, next)));
        assert!(ALL.into_iter().all(|state| !may_follow(state, Unspecified)));
    }
}
