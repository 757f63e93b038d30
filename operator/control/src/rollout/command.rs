//! Commands of people to a rollout.

use super::machine::Machine;
use super::state::{Member, RolloutPhase};
use super::{Command, CommandText};

impl Machine<'_, '_> {
    /// Follows commands that are new, the strongest one only. All are consumed: a command that cannot be
    /// followed now is not followed later.
    pub(super) fn follow_command(&mut self) -> bool {
        let new: Vec<(Command, CommandText)> = self
            .facts
            .commands
            .iter()
            .filter(|(command, text)| !self.state.has_consumed(**command, text))
            .map(|(command, text)| (*command, text.clone()))
            .collect();
        if new.is_empty() {
            return false;
        }
        self.state.consumed.extend(new.iter().cloned());
        for (command, text) in new {
            if self.obey(command, text.revision()) {
                break;
            }
        }
        true
    }

    /// Whether the command applies to the present state.
    fn obey(&mut self, command: Command, revision: &str) -> bool {
        let is = |member: &Option<Member>| member.as_ref().is_some_and(|one| one.revision == revision);
        match command {
            Command::Abort if is(&self.state.candidate) && self.state.stable.is_some() => {
                self.start_rollback("Aborted", "somebody aborted the rollout".to_owned());
                true
            }
            Command::Undo if self.state.phase == RolloutPhase::Promoted && is(&self.state.stable) => {
                self.undo("Undone", "somebody asked for the previous revision".to_owned());
                true
            }
            Command::Promote if is(&self.state.candidate) => {
                self.state.forced = true;
                self.state.held = false;
                self.record(revision, "Forced", "Promote", "somebody skipped the remaining steps".to_owned());
                true
            }
            Command::Promote if self.state.phase == RolloutPhase::Promoted && is(&self.state.stable) => {
                self.finish_bake();
                true
            }
            Command::Promote if self.state.refused.as_deref() == Some(revision) => {
                self.start(revision);
                true
            }
            Command::Abort | Command::Undo | Command::Promote => false,
        }
    }
}
