// Continuous batching: sequences join and leave the running batch at every step, prompts are read in chunks beside the
// decoding rows, pages are taken as sequences grow, the latest sequence gives way when none is free and comes back
// later. None of it changes a bit of any sequence (DESIGN §2): a token is a function of weights, prompt, settings, seed
// and id.
//
// Where few sequences decode, tokens may be guessed (drafter.h) and read beside the last known one of a sequence. The
// model samples at each position in turn, with the random numbers of that position, and goes on while the guess is what
// was sampled: the text and its log-probs are those without guesses. What was read beyond is written over.
//
// Several ranks run the same program on the same tokens: what comes from outside is told to all by the rank that
// answers, and what the last stage samples by its ranks to their pipelines.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#include "model/drafter.h"
#include "model/kv_cache.h"
#include "model/parallel.h"
#include "model/transformer.h"

namespace lockstep::model {

struct GenerateSettings {
  float temperature, topP;
  int32_t topK;
  std::vector<int32_t> stopTokens;
  uint64_t seed;
  int64_t rows;       // rows of one forward pass: prompt chunks and decoding rows together
  int64_t sequences;  // sequences that run together, at most
  int64_t guesses;    // for one sequence and step, at most
  int64_t guessRows;  // rows of a step that has guesses, at most; as many are sampled, or as many as sequences
  int64_t pages;      // pages of keys and values, per layer
  bool poison;        // fill freed pages with NaN
};

struct GenerateRequest {
  std::vector<int32_t> prompt;
  int64_t maxNewTokens;
  uint64_t id;
};

enum class Finish : uint8_t { kStop, kLength, kAborted };

struct Generated {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  Finish finish = Finish::kAborted;
};

// How the outside talks to a running generation: abort, end single requests. Thread-safe.
class GenerateControl {
 public:
  void abort() { aborted_ = true; }
  bool aborted() const { return aborted_; }
  void end(int32_t request);
  std::vector<int32_t> takeEnded();

 private:
  std::atomic<bool> aborted_{false};
  std::mutex mutex_;
  std::vector<int32_t> ended_;
};

struct GenerateStatistics {
  int64_t steps = 0, rows = 0, preemptions = 0, sharedPositions = 0, guessed = 0, accepted = 0;
};

class Generator {
 public:
  // New tokens since the last call: (request, token) pairs, in order.
  using Progress = std::function<void(std::vector<int32_t> requests, std::vector<int32_t> tokens)>;

  Generator(const Spec&, const Parallel&, Transformer&, const kernels::Kernels&, Queue&, const Workspace&,
            const GenerateSettings&);

  std::vector<Generated> run(const std::vector<GenerateRequest>&, GenerateControl&, const Progress&);
  const GenerateStatistics& statistics() const { return statistics_; }

 private:
  struct Sequence {
    int32_t request;
    std::vector<int32_t> tokens;  // prompt, then what was generated
    int64_t cached = 0;           // positions whose keys and values are in pages
    int64_t rows = 0;             // rows of this step
    std::vector<int32_t> pages = {};
    std::vector<int32_t> guess = {};  // tokens that this step reads after the known ones
    int64_t nextGuess = 0;            // how many the next step may have

    int64_t missing() const { return static_cast<int64_t>(tokens.size()) - cached; }
    // Its last known token is read in this step.
    bool samples() const { return rows > 0 && rows == missing() + static_cast<int64_t>(guess.size()); }
  };
  // A prompt that several requests share: one of them reads it, its pages are kept until the others have started.
  struct Prefix {
    int64_t followers = 0;  // requests that have not started
    bool reading = false;
    std::vector<int32_t> pages;
  };

  // What the outside wants before a step, the same on all ranks.
  struct Orders {
    bool aborted;
    std::vector<int32_t> ended;
  };

  void enqueue(const std::vector<GenerateRequest>&, std::vector<Generated>&);
  void admit();
  bool start(Sequence&);
  void attachPrefix(Sequence&, const Prefix&);
  void keepPrefix(const Sequence&);
  bool dropPrefixes();
  bool reserve(Sequence&);
  void preemptLast();
  Batch plan();
  void guess();
  void sample(Operand hidden);
  void sampleRows(Operand hidden, const std::vector<int64_t>& rows, const std::vector<kernels::Sampling>&);
  void collect(std::vector<Generated>&);
  bool take(Sequence&, size_t first, Generated&);
  void endRequested(const std::vector<int32_t>& requests);
  Orders agree(GenerateControl&);
  void releasePages(Sequence&);
  Prefix& prefixOf(const Sequence& s) {
    return prefixes_[static_cast<size_t>(prefixIndex_[static_cast<size_t>(s.request)])];
  }
  int64_t promptLength(const Sequence& s) const {
    return static_cast<int64_t>((*requests_)[static_cast<size_t>(s.request)].prompt.size());
  }

  const Spec& spec_;
  const Parallel& parallel_;
  Transformer& transformer_;
  const kernels::Kernels& k_;
  Queue& queue_;
  const Workspace& workspace_;
  const GenerateSettings& settings_;
  PagePool pool_;
  const std::vector<GenerateRequest>* requests_ = nullptr;
  std::deque<Sequence> waiting_;
  std::vector<Sequence> running_;
  std::vector<int32_t> prefixIndex_;  // of each request
  std::vector<Prefix> prefixes_;
  Drafter drafter_;
  std::vector<int32_t> draftIndex_;  // the drafter's text of each request, or kNone
  static constexpr int32_t kNone = -1;
  // Of this step: what was sampled, sequence by sequence of running_.
  std::vector<int32_t> sampledTokens_;
  std::vector<float> sampledLogprobs_;
  // New tokens that the outside has not heard of.
  std::vector<int32_t> freshRequests_, freshTokens_;
  GenerateStatistics statistics_;
};

}  // namespace lockstep::model
