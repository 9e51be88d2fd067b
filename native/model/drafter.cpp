#include "model/drafter.h"

#include <algorithm>
#include <iterator>

namespace lockstep::model {

// 21 bits a token: of a larger vocabulary some tokens would be taken for others, and guesses be worse.
uint64_t Drafter::keyOf(const std::vector<int32_t>& tokens, int64_t end, int64_t length) {
  uint64_t key = length == kLongest ? 1 : 0;
  for (int64_t i = end - length; i < end; ++i) {
    key = key << 21 | (static_cast<uint64_t>(tokens[static_cast<size_t>(i)]) & 0x1fffff);
  }
  return key;
}

// The token at `position` follows those before it.
void Drafter::learn(int32_t text, int64_t position) {
  const std::vector<int32_t>& tokens = texts_[static_cast<size_t>(text)];
  for (int64_t length = kShortest; length <= std::min(kLongest, position); ++length) {
    followers_[keyOf(tokens, position, length)] = {text, position};
  }
}

int32_t Drafter::begin(const std::vector<int32_t>& prompt) {
  const auto text = static_cast<int32_t>(texts_.size());
  texts_.push_back(prompt);
  for (int64_t i = 1; i < std::ssize(prompt); ++i) learn(text, i);
  return text;
}

void Drafter::append(int32_t text, int32_t token) {
  std::vector<int32_t>& tokens = texts_[static_cast<size_t>(text)];
  tokens.push_back(token);
  learn(text, std::ssize(tokens) - 1);
}

std::vector<int32_t> Drafter::propose(int32_t text, int64_t most) const {
  const std::vector<int32_t>& tokens = texts_[static_cast<size_t>(text)];
  for (int64_t length = kLongest; length >= kShortest; --length) {
    if (length > std::ssize(tokens)) continue;
    const auto found = followers_.find(keyOf(tokens, std::ssize(tokens), length));
    if (found == followers_.end()) continue;
    const auto [from, position] = found->second;
    const std::vector<int32_t>& source = texts_[static_cast<size_t>(from)];
    std::vector<int32_t> draft;
    // A text that repeats itself goes on in its own guess.
    for (int64_t i = position; std::ssize(draft) < most; ++i) {
      if (i < std::ssize(source)) {
        draft.push_back(source[static_cast<size_t>(i)]);
      } else if (from == text) {
        draft.push_back(draft[static_cast<size_t>(i - std::ssize(source))]);
      } else {
        break;
      }
    }
    return draft;
  }
  return {};
}

}  // namespace lockstep::model
