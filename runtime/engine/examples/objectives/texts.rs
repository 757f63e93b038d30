//! The prompts and requests of the objectives.

use trustformers_engine::{Engine, GenerateParams, Prompt};

/// Prose on several subjects, written for this program, so that no model was trained on it.
pub(crate) const PROSE: &str = "\
The harbour of Larn wakes before the sun does. First come the ropes, creaking as the tide lifts the boats; then the \
gulls, who have opinions about everything; and last the fishermen, who have opinions about the gulls. Old Maren keeps \
the tea stall at the end of the pier. She says that you can tell the weather of a whole week from the way the first \
kettle boils, and nobody has ever dared to write down how often she was wrong. On the morning of this story the kettle \
boiled quietly, the water was as flat as a table, and a small green boat with no name came in from the open sea with \
nobody in it.

To bake a loaf that keeps for a week, begin the evening before. Stir two hundred grams of rye flour into as much warm \
water, add a spoon of the sour starter, cover the bowl and leave it in a warm corner. In the morning the mixture should \
smell of apples and be full of bubbles. Now work in three hundred grams of wheat flour, ten grams of salt and a little \
more water, until the dough no longer sticks to the table. Let it rest for two hours, fold it twice, and bake it in a \
hot oven for fifty minutes. Do not cut it while it is warm, however good it smells.

A queue is a promise. Whoever joins it is told, without a word, that the ones in front were there first and that the \
ones behind will wait as well. When a computer keeps a queue, the promise is easy to break: a single caller with a \
thousand requests can stand in front of everybody else a thousand times. The remedy is to give each caller a queue of \
their own and to let the queues take turns. It costs a few lines of code. What it buys is that a stranger who asks one \
short question gets an answer while the long ones are still being written.

Question: How many days are there between the third of March and the third of April? Answer: There are thirty-one days, \
because March has thirty-one days. Question: What is the largest planet of the solar system? Answer: The largest planet \
is Jupiter. Question: Which is heavier, a kilogram of iron or a kilogram of wool? Answer: They weigh the same.

In the second year of the drought the village council met under the plane tree, as it had met for two hundred years. \
There were three proposals. The miller wanted to deepen the old well; the teacher wanted to ask the city for a pipe; and \
the shepherd, who had not spoken at a meeting since her father died, wanted to plant trees on the northern slope. \
Everyone laughed at the shepherd, because trees need water, and water was what they did not have. She waited until they \
had finished. Then she explained that the slope had been a forest once, that the rain had stayed in its soil, and that \
the spring below it had dried up eleven years after the last of the oaks was sold.

The function takes a list of numbers and returns the length of the longest run that never falls. It walks through the \
list once. It keeps two figures: how long the present run is, and how long the best one was. When a number is at least \
as large as the one before it, the present run grows by one; otherwise it starts again at one. After each step the best \
is the larger of the two. An empty list has no run, so the answer for it is zero. The time is proportional to the length \
of the list, and apart from the two figures no memory is needed.
";

/// A prompt of so many tokens. Prompts of different salts below 9973 share no prefix.
pub(crate) fn prompt(tokens: usize, salt: usize) -> Prompt {
    Prompt::Tokens((0..tokens).map(|position| token(position, salt)).collect())
}

/// A token of a prompt: an ordinary one of any vocabulary of some ten thousand. The first tokens differ
/// already.
pub(crate) fn token(position: usize, salt: usize) -> u32 {
    1000 + ((position * 7919 + salt * 104_729) % 9973) as u32
}

/// A request for exactly `answer_tokens` tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TestRequest {
    pub(crate) prompt_tokens: usize,
    pub(crate) salt: usize,
    pub(crate) answer_tokens: usize,
}

impl TestRequest {
    /// Its parameters: end tokens are impossible.
    pub(crate) fn params(self, engine: &Engine) -> GenerateParams {
        let ends = engine.model().tokenizer().eos_ids();
        GenerateParams {
            prompt: prompt(self.prompt_tokens, self.salt),
            logit_bias: ends.iter().map(|id| (*id, -100.0)).collect(),
            ..GenerateParams::greedy("", self.answer_tokens)
        }
    }
}
