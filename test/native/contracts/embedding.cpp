// Contracts of the embeddings: tokens repeat, some rows are padding, vocabularies are cut unevenly.
#include "rows.h"

namespace lockstep::contracts {
namespace {

struct Problem {
  std::vector<int32_t> tokens, positions;
  std::shared_ptr<kernels::WeightLayout> layout;
  bool hasPositions;
  int64_t width, rows;
  Buffer table;

  explicit Problem(Trial& t) : hasPositions(t.chance(0.5)), width(drawWidth(t)), rows(t.rows()) {
    const int64_t vocabulary = t.integer(1, 300), positionCount = 64;
    t.note("rows", rows);
    t.note("width", width);
    t.note("vocabulary", vocabulary);
    const auto split = t.chance(0.5) ? kernels::Split::kOut : kernels::Split::kNone;
    layout = std::make_shared<kernels::WeightLayout>(drawLayout(t, vocabulary, width, split));
    const int64_t used = t.chance(0.5) ? vocabulary : std::min<int64_t>(vocabulary, 3);
    for (int64_t i = 0; i < rows; ++i) {
      tokens.push_back(t.chance(0.1) ? -1 : static_cast<int32_t>(t.integer(0, used - 1)));
      const bool padding = tokens.back() < 0 && t.chance(0.5);  // else the token is another rank's
      positions.push_back(padding ? -1 : static_cast<int32_t>(t.integer(0, positionCount - 1)));
    }
    table = t.floats(positionCount * width);
  }
};

const Registration kEmbed("embed", 60, [](Trial& t) {
  Problem p(t);
  const WeightMatrix e = t.weight(t.dtype(), *p.layout);
  const float* table = p.hasPositions ? p.table.as<float>() : nullptr;
  Matrix expected = t.matrix(DType::kFloat32, p.rows, p.width);
  const Matrix blank = expected.clone();
  t.reference().embed(t.referenceQueue(), p.tokens.data(), p.positions.data(), e.weight(), table, expected.view());
  t.eachQueue([&](Queue& queue) {
    Matrix actual = blank.clone();
    t.implementation().embed(queue, p.tokens.data(), p.hasPositions ? p.positions.data() : nullptr, e.weight(), table,
                             actual.view());
    t.compare("x", expected, actual);
  });
});

const Registration kEmbedBackward("embedBackward", DType::kFloat32, 60, [](Trial& t) {
  Problem p(t);
  const WeightMatrix start = t.weight(DType::kFloat32, *p.layout);
  const Matrix dx = t.matrix(DType::kFloat32, p.rows, p.width);
  WeightMatrix expected = start.clone();
  Buffer expectedTable = p.table.clone();
  t.reference().embedBackward(t.referenceQueue(), p.tokens.data(), p.positions.data(), dx.view(), expected.gradient(),
                              p.hasPositions ? expectedTable.as<float>() : nullptr);
  t.eachQueue([&](Queue& queue) {
    WeightMatrix actual = start.clone();
    Buffer table = p.table.clone();
    const int64_t first = t.integer(0, p.rows);
    for (const auto& [begin, count] : {std::pair{int64_t{0}, first}, std::pair{first, p.rows - first}}) {
      t.implementation().embedBackward(queue, p.tokens.data() + begin, p.positions.data() + begin,
                                       dx.view().slice(begin, count), actual.gradient(),
                                       p.hasPositions ? table.as<float>() : nullptr);
    }
    t.compare("dE", expected, actual);
    t.compare("dPositionTable", expectedTable, table);
  });
});

}  // namespace
}  // namespace lockstep::contracts
