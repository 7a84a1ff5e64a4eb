// Terms that the page explains: a meaning in plain words, and the formula with its place in the paper.

export interface Definition {
  meaning: string;
  formula?: string;
}

export const GLOSSARY = {
  influence: {
    meaning:
      "How similar the corrected gradients of the training example and of the question are, from −1 to 1. " +
      "A training step on an example with positive influence makes the completion more probable, to first order.",
    formula: "cosine of the corrected gradients R^(−1/2) P (∇loss / √V) (paper, Eq. 1 and 2)",
  },
  bm25: {
    meaning: "Words that the training example shares with prompt and completion, rare words weighted more. BM25 does not use the model.",
  },
  embeddings: {
    meaning: "Similarity in meaning of the training example and the question, by a sentence-embedding model. It does not use the model that is explained.",
  },
  mixing: {
    meaning: "How much the task's own queries shape the correction (λ): 0 uses the training corpus only, 1 uses the task's queries only.",
    formula: "R = λ R_eval + (1 − λ)(R_train + cI) (paper, Eq. 3)",
  },
  damping: {
    meaning: "Keeps the correction stable in directions in which few training examples have gradients.",
    formula: "c in R_train + cI, as a fraction of R_train's mean eigenvalue per block",
  },
  spectra: {
    meaning:
      "Each curve shows how strongly gradients vary along each direction, from the strongest (rank 1) on: over the task's queries, and " +
      "over the training corpus. The paper chooses λ so that both are equal at the marked rank.",
    formula: "λ σₖ(R_eval) = (1 − λ) σₖ(R_train) at rank k (paper, §4.3)",
  },
} satisfies Record<string, Definition>;

export type TermName = keyof typeof GLOSSARY;
