#include "model/generator.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <utility>

#include "core/error.h"
#include "core/range.h"

namespace lockstep::model {

namespace {

constexpr auto kProgressInterval = std::chrono::milliseconds(25);

int64_t pagesFor(int64_t positions) {
  return (positions + kernels::kPagePositions - 1) / kernels::kPagePositions;
}

// The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: steps whose contexts grow repeat the work of few buckets (Queue::repeat).
int64_t roomFor(int64_t pages) {
  int64_t room = 1;
  while (room < pages) room = room < 2 ? room + 1 : (room & (room - 1)) == 0 ? room / 2 * 3 : room / 3 * 4;
  return room;
}

kernels::KvPages pageShape(const Spec& spec) {
  return {nullptr, spec.dtype, spec.shape.keyValueHeads, spec.shape.headWidth};
}

int64_t sizeOf(const std::vector<int32_t>& v) {
  return static_cast<int64_t>(v.size());
}

}  // namespace

void GenerateControl::end(int32_t request) {
  const std::lock_guard lock(mutex_);
  ended_.push_back(request);
}

std::vector<int32_t> GenerateControl::takeEnded() {
  const std::lock_guard lock(mutex_);
  return std::exchange(ended_, {});
}

Generator::Generator(const Spec& spec, const Parallel& parallel, Transformer& transformer,
                     const kernels::Kernels& kernels, Queue& queue, const Workspace& workspace,
                     const GenerateSettings& settings)
    : spec_(spec),
      parallel_(parallel),
      transformer_(transformer),
      k_(kernels),
      queue_(queue),
      workspace_(workspace),
      settings_(settings),
      pool_(queue, workspace.take("kv", workspace.bytes("kv")), pageShape(spec), spec.shape.layers, settings.pages,
            settings.poison) {}

std::vector<Generated> Generator::run(const std::vector<GenerateRequest>& requests, GenerateControl& control,
                                      const Progress& progress) {
  std::vector<Generated> results(requests.size());
  queue_.forget();
  enqueue(requests, results);
  auto last = std::chrono::steady_clock::now();
  while (!waiting_.empty() || !running_.empty()) {
    const Orders orders = agree(control);
    if (orders.aborted) break;
    endRequested(orders.ended);
    admit();
    if (running_.empty()) continue;
    Pass pass{.workspace = workspace_, .batch = plan(), .pageCount = pool_.total()};
    const bool decodes = pass.rows() == pass.batch.count();  // a token each: the step of all steps
    const bool verifies =
        std::any_of(running_.begin(), running_.end(), [](const Sequence& s) { return !s.guess.empty(); });
    const Range range(decodes ? "decode" : verifies ? "verify" : "prefill");
    const auto forward = [&] { transformer_.forward({&pass, 1}, Keep::kCache); };
    if (parallel_.replica == nullptr && decodes) {
      queue_.repeat("decode " + std::to_string(pass.rows()) + " " + std::to_string(pass.batch.pageStride), forward);
    } else {
      forward();
    }
    statistics_.steps += 1;
    statistics_.rows += pass.rows();
    sample(pass.hidden);
    collect(results);
    const auto now = std::chrono::steady_clock::now();
    if (progress && !freshTokens_.empty() && now - last >= kProgressInterval) {
      progress(std::exchange(freshRequests_, {}), std::exchange(freshTokens_, {}));
      last = now;
    }
  }
  if (progress && !freshTokens_.empty()) progress(std::move(freshRequests_), std::move(freshTokens_));
  return results;
}

Generator::Orders Generator::agree(GenerateControl& control) {
  comm::Communicator* replica = parallel_.replica.get();
  if (replica == nullptr) return {control.aborted(), control.takeEnded()};
  Orders orders{};
  int32_t header[2] = {};  // aborted, requests to end
  const int leader = parallel_.leader();
  if (replica->rank() == leader) {
    orders = {control.aborted(), control.takeEnded()};
    header[0] = orders.aborted ? 1 : 0;
    header[1] = static_cast<int32_t>(orders.ended.size());
  }
  replica->broadcast(header, sizeof header, comm::Element::kByte, leader, "orders");
  orders.aborted = header[0] != 0;
  orders.ended.resize(static_cast<size_t>(header[1]));
  if (header[1] > 0) replica->broadcast(orders.ended.data(), header[1] * 4, comm::Element::kByte, leader, "ended");
  return orders;
}

// Requests with equal prompts form a prefix.
void Generator::enqueue(const std::vector<GenerateRequest>& requests, std::vector<Generated>& results) {
  requests_ = &requests;
  draftIndex_.assign(requests.size(), kNone);
  std::map<std::vector<int32_t>, int32_t> seen;
  for (size_t r = 0; r < requests.size(); ++r) {
    const int32_t request = static_cast<int32_t>(r);
    const auto [at, isNew] = seen.try_emplace(requests[r].prompt, static_cast<int32_t>(prefixes_.size()));
    if (isNew) prefixes_.emplace_back();
    prefixIndex_.push_back(at->second);
    const int64_t positions = sizeOf(requests[r].prompt) + requests[r].maxNewTokens;
    if (pagesFor(positions) > pool_.total()) {
      throw Error("KV_BUDGET", "request " + std::to_string(r) + " needs " + std::to_string(pagesFor(positions)) +
                                   " pages of keys and values (" + std::to_string(positions) +
                                   " positions), the budget holds " + std::to_string(pool_.total()) +
                                   "; raise memory.device or lower the number of new tokens");
    }
    if (requests[r].maxNewTokens == 0) {
      results[r].finish = Finish::kLength;
      continue;
    }
    prefixes_[static_cast<size_t>(at->second)].followers += 1;
    waiting_.push_back({.request = request, .tokens = requests[r].prompt, .nextGuess = settings_.guesses});
  }
}

// Starts waiting sequences in order while there is room. One whose prompt is being read by another waits for it.
void Generator::admit() {
  for (size_t i = 0; i < waiting_.size() && static_cast<int64_t>(running_.size()) < settings_.sequences;) {
    Sequence& s = waiting_[i];
    if (prefixOf(s).reading) {
      ++i;
      continue;
    }
    if (!start(s)) {
      if (!running_.empty() || !dropPrefixes()) return;
      continue;  // nothing runs: pages kept for shared prompts make room
    }
    running_.push_back(std::move(s));
    waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

bool Generator::start(Sequence& s) {
  Prefix& prefix = prefixOf(s);
  const int64_t shared = prefix.pages.empty() ? 0 : (promptLength(s) - 1) / kernels::kPagePositions;
  // A little is left for the sequences that run already, so that starting one does not at once send another back.
  const int64_t spare = running_.empty() ? 0 : pool_.total() / 64;
  if (pool_.free() < pagesFor(sizeOf(s.tokens) + 1) - shared + spare) return false;
  if (!prefix.pages.empty()) {
    attachPrefix(s, prefix);
  } else {
    prefix.reading = prefix.followers > 1;
  }
  int32_t& draft = draftIndex_[static_cast<size_t>(s.request)];
  if (settings_.guesses > 0 && draft == kNone) draft = drafter_.begin(s.tokens);
  prefix.followers = std::max<int64_t>(0, prefix.followers - 1);
  if (prefix.followers == 0) {
    for (const int32_t page : std::exchange(prefix.pages, {})) pool_.release(page);
  }
  return true;
}

// Takes over the prompt but its last position, which is read again as a row of its own: that gives the bits of the row
// that was read first. Whole pages are shared, a partial one is copied.
void Generator::attachPrefix(Sequence& s, const Prefix& prefix) {
  const int64_t positions = promptLength(s) - 1, whole = positions / kernels::kPagePositions;
  for (int64_t i = 0; i < whole; ++i) {
    const int32_t page = prefix.pages[static_cast<size_t>(i)];
    pool_.share(page);
    s.pages.push_back(page);
  }
  s.cached = whole * kernels::kPagePositions;
  if (positions > s.cached) {
    const int32_t page = pool_.allocate();
    pool_.copy(prefix.pages[static_cast<size_t>(whole)], page);
    s.pages.push_back(page);
    s.cached = positions;
  }
  statistics_.sharedPositions += s.cached;
}

// The prompt of `s` has been read: its pages are kept for those that wait for it.
void Generator::keepPrefix(const Sequence& s) {
  Prefix& prefix = prefixOf(s);
  if (!prefix.reading) return;
  prefix.reading = false;
  if (prefix.followers == 0) return;
  for (int64_t i = 0; i < pagesFor(promptLength(s)); ++i) {
    prefix.pages.push_back(s.pages[static_cast<size_t>(i)]);
    pool_.share(prefix.pages.back());
  }
}

bool Generator::dropPrefixes() {
  bool dropped = false;
  for (Prefix& prefix : prefixes_) {
    dropped = dropped || !prefix.pages.empty();
    for (const int32_t page : std::exchange(prefix.pages, {})) pool_.release(page);
  }
  return dropped;
}

void Generator::releasePages(Sequence& s) {
  for (const int32_t page : std::exchange(s.pages, {})) pool_.release(page);
  s.cached = s.rows = 0;
  s.guess.clear();
}

// Pages for the positions cached after this step. False: none is free.
bool Generator::reserve(Sequence& s) {
  while (sizeOf(s.pages) < pagesFor(s.cached + s.rows)) {
    const int32_t page = pool_.allocate();
    if (page == PagePool::kNone) return false;
    s.pages.push_back(page);
  }
  return true;
}

// The latest sequence gives its pages back; it will be read again from its tokens, with the same bits.
void Generator::preemptLast() {
  Sequence& s = running_.back();
  if (s.cached < promptLength(s)) prefixOf(s).reading = false;
  releasePages(s);
  waiting_.push_front(std::move(s));
  running_.pop_back();
  statistics_.preemptions += 1;
}

// Rows of this step: one for each decoding sequence, the rest for prompts, in order.
Batch Generator::plan() {
  int64_t left = settings_.rows;
  for (const bool decoding : {true, false}) {
    for (Sequence& s : running_) {
      if ((s.missing() == 1) != decoding) continue;
      s.rows = std::min(s.missing(), left);
      left -= s.rows;
    }
  }
  for (size_t i = 0; i < running_.size();) {
    if (reserve(running_[i])) {
      ++i;
    } else if (!dropPrefixes()) {
      preemptLast();
    }
  }
  guess();
  Batch batch;
  int64_t most = 0;
  for (const Sequence& s : running_) most = std::max(most, sizeOf(s.pages));
  batch.pageStride = roomFor(most);
  for (const Sequence& s : running_) {
    if (s.rows == 0) continue;
    batch.rowBegin.push_back(static_cast<int32_t>(batch.rows()));
    batch.length.push_back(static_cast<int32_t>(s.rows));
    batch.offset.push_back(static_cast<int32_t>(s.cached));
    for (int64_t i = s.cached; i < s.cached + s.rows; ++i) {
      const int64_t guessed = i - sizeOf(s.tokens);
      batch.tokens.push_back(guessed < 0 ? s.tokens[static_cast<size_t>(i)] : s.guess[static_cast<size_t>(guessed)]);
      batch.positions.push_back(static_cast<int32_t>(i));
    }
    std::vector<int32_t> row = s.pages;
    row.resize(static_cast<size_t>(batch.pageStride), 0);
    batch.pages.insert(batch.pages.end(), row.begin(), row.end());
  }
  return batch;
}

// Rows are guessed where all sequences decode and few of them do: there a row more costs little. Only free pages are
// taken for them.
void Generator::guess() {
  const auto decodes = [](const Sequence& s) { return s.rows == 1 && s.missing() == 1; };
  if (settings_.guesses == 0 || !std::all_of(running_.begin(), running_.end(), decodes)) return;
  auto waiting = static_cast<int64_t>(running_.size());
  int64_t left = std::min(settings_.guessRows, settings_.rows) - waiting;
  for (Sequence& s : running_) {
    if (left <= 0) break;
    const int64_t share = (left + waiting - 1) / waiting--;
    const GenerateRequest& request = (*requests_)[static_cast<size_t>(s.request)];
    const int64_t toCome = sizeOf(request.prompt) + request.maxNewTokens - sizeOf(s.tokens);
    const int64_t most = std::min({s.nextGuess, share, toCome - 1});
    if (most <= 0) continue;
    s.guess = drafter_.propose(draftIndex_[static_cast<size_t>(s.request)], most);
    s.rows += sizeOf(s.guess);
    if (!reserve(s)) {
      s.rows = sizeOf(s.pages) * kernels::kPagePositions - s.cached;
      s.guess.resize(static_cast<size_t>(s.rows - 1));
    }
    left -= sizeOf(s.guess);
    statistics_.guessed += sizeOf(s.guess);
  }
}

// A token for every sequence whose last known token was read in this step, and one for each guess that was read.
void Generator::sample(Operand hidden) {
  std::vector<kernels::Sampling> settings;
  std::vector<int64_t> rows;
  int64_t row = 0;
  for (const Sequence& s : running_) {
    row += s.rows;
    if (!s.samples()) continue;
    for (int64_t i = 0; i <= sizeOf(s.guess); ++i) {
      rows.push_back(row - 1 - sizeOf(s.guess) + i);
      settings.push_back({settings_.temperature, settings_.topP, settings_.topK, settings_.seed,
                          (*requests_)[static_cast<size_t>(s.request)].id,
                          static_cast<uint32_t>(sizeOf(s.tokens) + i)});
    }
  }
  sampledTokens_.resize(rows.size());
  sampledLogprobs_.assign(rows.size(), 0.0f);
  if (rows.empty()) return;
  if (parallel_.lastStage()) sampleRows(hidden, rows, settings);
  if (comm::Communicator* pipeline = parallel_.pipeline.get()) {
    pipeline->broadcast(sampledTokens_.data(), sizeOf(sampledTokens_) * 4, comm::Element::kByte, pipeline->size() - 1,
                        "sampled tokens");
  }
}

// Into sampledTokens_ and sampledLogprobs_. All ranks of a tensor group have all logits and draw the same tokens.
void Generator::sampleRows(Operand hidden, const std::vector<int64_t>& rows,
                           const std::vector<kernels::Sampling>& settings) {
  const int64_t count = static_cast<int64_t>(rows.size()), vocabulary = spec_.shape.vocabulary;
  const Operand gathered = workspace_.operand("sampledHidden", kAbsent, spec_.dtype, count, hidden.cols);
  const auto bytes = [&](int64_t elements) { return static_cast<size_t>(elements) * bytesOf(spec_.dtype); };
  for (int64_t i = 0, n = 0; i < count; i += n) {  // neighbours together
    const int64_t row = rows[static_cast<size_t>(i)];
    for (n = 1; i + n < count && rows[static_cast<size_t>(i + n)] == row + n;) ++n;
    queue_.copyRows(gathered.rowBytes(i), bytes(gathered.stride), hidden.rowBytes(row), bytes(hidden.stride),
                    bytes(hidden.cols), n);
  }
  const View<float> logits = workspace_.f32("logits", kAbsent, count, vocabulary);
  transformer_.logits(gathered, logits);
  const kernels::WeightLayout layout = transformer_.vocabularyLayout();
  k_.sample(queue_, logits, layout, settings.data(), sampledTokens_.data(), sampledLogprobs_.data());
}

void Generator::collect(std::vector<Generated>& results) {
  size_t first = 0, kept = 0;
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& s = running_[i];
    Generated& result = results[static_cast<size_t>(s.request)];
    bool done = false;
    if (!s.samples()) {
      s.cached += std::exchange(s.rows, 0);
    } else {
      keepPrefix(s);
      const size_t count = s.guess.size() + 1;
      done = take(s, first, result);
      first += count;
    }
    if (done) {
      releasePages(s);
    } else {
      if (kept != i) running_[kept] = std::move(s);
      ++kept;
    }
  }
  running_.resize(kept);
}

// What was sampled from `first` on, as far as the guesses before it are what was sampled. Whether the sequence is done.
bool Generator::take(Sequence& s, size_t first, Generated& result) {
  const GenerateRequest& request = (*requests_)[static_cast<size_t>(s.request)];
  const std::vector<int32_t>& stops = settings_.stopTokens;
  bool done = false;
  size_t taken = 0;
  for (bool guessed = true; guessed && !done; ++taken) {
    const int32_t token = sampledTokens_[first + taken];
    s.tokens.push_back(token);
    result.tokens.push_back(token);
    result.logprobs.push_back(sampledLogprobs_[first + taken]);
    freshRequests_.push_back(s.request);
    freshTokens_.push_back(token);
    if (settings_.guesses > 0) drafter_.append(draftIndex_[static_cast<size_t>(s.request)], token);
    const bool stopped = std::find(stops.begin(), stops.end(), token) != stops.end();
    done = stopped || sizeOf(result.tokens) == request.maxNewTokens;
    if (done) result.finish = stopped ? Finish::kStop : Finish::kLength;
    guessed = taken < s.guess.size() && token == s.guess[taken];
  }
  const auto right = static_cast<int64_t>(taken) - 1;
  statistics_.accepted += right;
  s.nextGuess = right == sizeOf(s.guess) ? settings_.guesses : std::max<int64_t>(1, right);
  s.guess.clear();
  s.rows = 0;
  s.cached = sizeOf(s.tokens) - 1;
  return done;
}

// Requests that the caller ended keep what they have and finish as aborted.
void Generator::endRequested(const std::vector<int32_t>& requests) {
  for (const int32_t request : requests) {
    const auto isIt = [request](const Sequence& s) { return s.request == request; };
    if (const auto at = std::find_if(running_.begin(), running_.end(), isIt); at != running_.end()) {
      if (at->cached < promptLength(*at)) prefixOf(*at).reading = false;
      releasePages(*at);
      running_.erase(at);
    } else if (const auto at2 = std::find_if(waiting_.begin(), waiting_.end(), isIt); at2 != waiting_.end()) {
      prefixOf(*at2).followers -= 1;
      waiting_.erase(at2);
    }
  }
}

}  // namespace lockstep::model
