// Guesses at how texts go on, for speculation: what followed the same tokens before, in the text itself or in another
// that begins with the same prompt (prompt lookup). A guess costs no pass of a model, and it changes no text: the model
// samples at every position that was guessed, and a guess counts while it is what was sampled.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace lockstep::model {

class Drafter {
 public:
  // Texts are numbered in the order in which they are begun.
  int32_t begin(const std::vector<int32_t>& prompt);
  void append(int32_t text, int32_t token);
  // At most `most` tokens that may follow; none where nothing like the end of the text was seen.
  std::vector<int32_t> propose(int32_t text, int64_t most) const;

  static constexpr int64_t kLongest = 3, kShortest = 2;  // tokens at the end of a text that are looked up

 private:
  struct Place {
    int32_t text;
    int64_t position;
  };

  static uint64_t keyOf(const std::vector<int32_t>& tokens, int64_t end, int64_t length);
  void learn(int32_t text, int64_t position);

  std::vector<std::vector<int32_t>> texts_;
  std::unordered_map<uint64_t, Place> followers_;  // where what followed last lies
};

}  // namespace lockstep::model
