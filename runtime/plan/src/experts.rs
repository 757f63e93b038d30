//! Experts of a feed-forward part, and which of them a row uses.

/// The experts of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many each row uses; at most `count`.
    pub used: usize,
    /// Features of an expert's hidden layer.
    pub hidden: usize,
}

/// An expert that a row uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChosenExpert {
    /// Which.
    pub index: usize,
    /// Its share of the row's answer; the shares of a row add up to one.
    pub share: f32,
}

impl Experts {
    /// Appends the experts that a row with these scores uses: those with the highest scores, best first, and
    /// of equal ones the first. Their shares are the softmax of their scores.
    ///
    /// # Panics
    /// When there is no score for each expert: the builder of the plan checked it.
    pub fn choose(&self, scores: &[f32], chosen: &mut Vec<ChosenExpert>) {
        assert_eq!(scores.len(), self.count, "a score for each expert");
        let first = chosen.len();
        for _ in 0..self.used {
            let mut best: Option<usize> = None;
            for (index, score) in scores.iter().enumerate() {
                let is_chosen = chosen[first..].iter().any(|expert| expert.index == index);
                if !is_chosen && best.is_none_or(|best| *score > scores[best]) {
                    best = Some(index);
                }
            }
            chosen.extend(best.map(|index| ChosenExpert { index, share: 0.0 }));
        }
        let own = &mut chosen[first..];
        let Some(best) = own.first().map(|expert| f64::from(scores[expert.index])) else { return };
        let weight = |expert: &ChosenExpert| (f64::from(scores[expert.index]) - best).exp();
        let total: f64 = own.iter().map(weight).sum();
        for expert in own {
            expert.share = (weight(expert) / total) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_scores_are_chosen_and_their_shares_add_up_to_one() {
        let experts = Experts { count: 4, used: 2, hidden: 1 };
        let mut chosen = Vec::new();
        experts.choose(&[1.0, 3.0, 3.0, -5.0], &mut chosen);
        experts.choose(&[2.0, 0.0, 1.0, 0.0], &mut chosen);
        let indices: Vec<usize> = chosen.iter().map(|expert| expert.index).collect();
        assert_eq!(indices, [1, 2, 0, 2]);
        assert_eq!((chosen[0].share, chosen[1].share), (0.5, 0.5));
        let share = 1.0 / (1.0 + (-1.0f64).exp());
        assert!((f64::from(chosen[2].share) - share).abs() < 1e-7);
        assert!((chosen[2].share + chosen[3].share - 1.0).abs() < 1e-6);
    }
}
