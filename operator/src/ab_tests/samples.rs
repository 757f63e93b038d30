//! What gateways have counted of tests, for the tasks of the leader.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use trustformers_control::ab_test::sample::SampleStore;
use trustformers_proto::control::v1::VariantCounts;

/// The sums of all tests.
#[derive(Default)]
pub struct TestSamples(Mutex<SampleStore>);

impl fmt::Debug for TestSamples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestSamples").finish_non_exhaustive()
    }
}

impl TestSamples {
    fn lock(&self) -> MutexGuard<'_, SampleStore> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records what the process of a gateway reports.
    pub fn record(&self, process: &str, variants: &[VariantCounts]) {
        self.lock().report(process, variants);
    }

    /// Forgets tests that do not exist any more.
    pub fn retain_tests(&self, uids: &BTreeSet<String>) {
        self.lock().retain_tests(uids);
    }

    /// Forgets epochs of a test that are not in `epochs`.
    pub fn retain_epochs(&self, test: &str, epochs: &BTreeSet<u64>) {
        self.lock().retain_epochs(test, epochs);
    }

    /// Reads or changes the sums. No report is recorded meanwhile.
    pub fn with<T>(&self, work: impl FnOnce(&mut SampleStore) -> T) -> T {
        work(&mut self.lock())
    }
}
