//! The answer of a step before it is awaited: its values, or the choices from them.

use crate::{BackendError, SampleInput, SampleResult, SampleScratch, StepInput, StepOutput, sample};

/// Of one executable.
#[derive(Default)]
pub(super) struct PendingAnswer {
    /// Of the step in flight.
    values: Option<Vec<f32>>,
    width: usize,
    logits_rows: usize,
    choices: Option<Vec<SampleResult>>,
    /// Ids of the latest sample; 0 for a row without a choice.
    sampled: Vec<u32>,
    /// Of the rows of the step.
    ids: Vec<u32>,
}

impl PendingAnswer {
    /// The id of each row of a step that may begin.
    pub(super) fn resolve(&mut self, input: &StepInput) -> Result<&[u32], BackendError> {
        input.resolve(&self.sampled, &mut self.ids)?;
        Ok(&self.ids)
    }

    pub(super) fn is_in_flight(&self) -> bool {
        self.values.is_some()
    }

    /// Ends a step with values of `width` columns.
    pub(super) fn finish(&mut self, input: &StepInput, values: Vec<f32>, width: usize) {
        (self.values, self.width, self.logits_rows) = (Some(values), width, input.logits_rows.len());
    }

    pub(super) fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        let values = self.values.as_ref().ok_or(BackendError::Order("sample without submit"))?;
        if self.choices.is_some() {
            return Err(BackendError::Order("sample after a sample of the same step"));
        }
        input.validate(self.logits_rows)?;
        let mut scratch = SampleScratch::default();
        let choice = |row| {
            let spec = input.row(row);
            let logits = &values[spec.logits_row * self.width..(spec.logits_row + 1) * self.width];
            sample::choose(logits, &spec, &mut scratch)
        };
        let choices: Vec<SampleResult> = (0..input.len()).map(choice).collect();
        self.sampled = choices.iter().map(|choice| choice.as_ref().map_or(0, |token| token.id)).collect();
        self.choices = Some(choices);
        Ok(())
    }

    pub(super) fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        let values = self.values.take().ok_or(BackendError::Order("wait without submit"))?;
        output.width = self.width;
        (output.choices, output.values) = match self.choices.take() {
            Some(choices) => (choices, Vec::new()),
            None => (Vec::new(), values),
        };
        Ok(())
    }
}
