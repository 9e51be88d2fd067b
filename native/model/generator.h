// Continuous batching: sequences join and leave the running batch at every step, prompts are read in chunks beside the
// decoding rows, pages are taken as sequences grow, the latest sequence gives way when none is free and comes back
// later. None of it changes a bit of any sequence (DESIGN §2): a token is a function of weights, prompt, settings, seed
// and id.
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
  int64_t steps = 0, rows = 0, preemptions = 0, sharedPositions = 0;
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
    std::vector<int32_t> pages;
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
  void sample(Operand hidden);
  void sampleRows(Operand hidden, const std::vector<int64_t>& rows, const std::vector<kernels::Sampling>&);
  void collect(std::vector<Generated>&);
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
  // Of this step: sequences (in running_) that sampled, and what.
  std::vector<size_t> sampled_;
  std::vector<int32_t> sampledTokens_;
  std::vector<float> sampledLogprobs_;
  GenerateStatistics statistics_;
};

}  // namespace lockstep::model
