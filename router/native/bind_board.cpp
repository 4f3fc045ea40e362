// Boards for Python: every method takes and returns tensors of the CPU, without the interpreter's lock. What breaks a
// group is Python's GroupBroken.
//
// Legend: T tokens of this rank, D model width, K experts per token, N ranks, L slots of a rank, R rows for this rank.
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include "board.h"
#include "rows.h"

namespace moestro {
namespace {

char* bytes(const at::Tensor& x) { return static_cast<char*>(x.data_ptr()); }

void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void check_fits(const Board& board, size_t num_bytes) {
  if (num_bytes > board.part_bytes())
    throw std::invalid_argument("a part of the board holds " + std::to_string(board.part_bytes()) + " bytes, not " +
                                std::to_string(num_bytes));
}

uint32_t post_tokens(Board& board, const at::Tensor& x_TD, const at::Tensor& slots_TK, int64_t max_tokens) {
  const auto x = x_TD.contiguous(), slots = slots_TK.contiguous();
  check(x.device().is_cpu() && slots.scalar_type() == at::kLong, "tokens on the CPU and int64 slots are wanted");
  const int64_t num_tokens = x.size(0), k = slots.size(1), row_bytes = x.size(1) * x.element_size();
  check_fits(board, bytes_needed(max_tokens, k, row_bytes));
  const uint32_t operation = board.begin();
  write_tokens(board.part(board.rank(), operation), bytes(x), slots.const_data_ptr<int64_t>(), num_tokens, k,
               row_bytes);
  board.post(operation);
  return operation;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> take_rows(Board& board, uint32_t operation,
                                                         const std::vector<int64_t>& num_tokens_N, int64_t k,
                                                         int64_t capacity, const at::Tensor& like_TD) {
  board.await_all(operation);
  const auto int64 = at::TensorOptions().dtype(at::kLong);
  auto counts_L = at::empty({capacity}, int64);
  auto* counts = counts_L.mutable_data_ptr<int64_t>();
  const int64_t num_rows = count_rows(board, operation, num_tokens_N, k, capacity, counts);
  auto x_RD = at::empty({num_rows, like_TD.size(1)}, like_TD.options());
  auto home_R = at::empty({num_rows}, int64);
  static_assert(sizeof(Home) == sizeof(int64_t));
  read_rows(board, operation, num_tokens_N, k, capacity, like_TD.size(1) * like_TD.element_size(), counts, bytes(x_RD),
            reinterpret_cast<Home*>(bytes(home_R)));
  board.take(operation);
  return {x_RD, counts_L, home_R};
}

bool is_bf16(const at::Tensor& x) {
  check(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, "bfloat16 or float32 is wanted");
  return x.scalar_type() == at::kBFloat16;
}

uint32_t post_rows(Board& board, const at::Tensor& y_RD, const at::Tensor& home_R) {
  is_bf16(y_RD);  // before anything is sent
  const auto y = y_RD.contiguous();
  check(y.size(0) >= home_R.size(0), "fewer rows than were dispatched");
  const uint32_t operation = board.begin();
  write_rows(board, operation, bytes(y), reinterpret_cast<const Home*>(bytes(home_R)), home_R.size(0),
             y.size(1) * y.element_size());
  board.post(operation);
  return operation;
}

at::Tensor sum_rows(Board& board, uint32_t operation, const at::Tensor& weights_TK, const at::Tensor& like_RD) {
  const auto weights = weights_TK.to(at::kFloat).contiguous();
  const int64_t num_tokens = weights.size(0), k = weights.size(1), width = like_RD.size(1);
  auto y_TD = at::empty({num_tokens, width}, like_RD.options());
  board.await_all(operation);
  const char* rows = board.part(board.rank(), operation);
  const auto* w = weights.const_data_ptr<float>();
  if (is_bf16(like_RD))
    weighted_sums_of(reinterpret_cast<const Bf16*>(rows), w, num_tokens, k, width,
                     reinterpret_cast<Bf16*>(bytes(y_TD)));
  else
    weighted_sums_of(reinterpret_cast<const float*>(rows), w, num_tokens, k, width,
                     reinterpret_cast<float*>(bytes(y_TD)));
  board.take(operation);
  return y_TD;
}

uint32_t post_bytes(Board& board, const at::Tensor& x) {
  check(x.device().is_cpu(), "a tensor on the CPU is wanted");
  check_fits(board, x.nbytes());
  const uint32_t operation = board.begin();
  const auto contiguous = x.contiguous();
  memcpy(board.part(board.rank(), operation), bytes(contiguous), contiguous.nbytes());
  board.post(operation);
  return operation;
}

at::Tensor all_gather(Board& board, const at::Tensor& x) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.insert(shape.begin(), board.size());
  auto all = at::empty(shape, x.options());
  const uint32_t operation = post_bytes(board, x);
  board.await_all(operation);
  for (int rank = 0; rank < board.size(); ++rank)
    memcpy(bytes(all) + rank * x.nbytes(), board.part(rank, operation), x.nbytes());
  board.take(operation);
  return all;
}

template <typename T>
void add_parts(const Board& board, uint32_t operation, at::Tensor& out) {
  std::vector<const T*> parts;
  for (int rank = 0; rank < board.size(); ++rank) parts.push_back(reinterpret_cast<T*>(board.part(rank, operation)));
  sums_of(parts, out.numel(), reinterpret_cast<T*>(bytes(out)));
}

at::Tensor sum(Board& board, const at::Tensor& x) {
  auto out = at::empty(x.sizes(), x.options());
  const bool bf16 = is_bf16(x);
  const uint32_t operation = post_bytes(board, x);
  board.await_all(operation);
  if (bf16)
    add_parts<Bf16>(board, operation, out);
  else
    add_parts<float>(board, operation, out);
  board.take(operation);
  return out;
}

void broadcast_(Board& board, const at::Tensor& x, int root) {
  check(x.device().is_cpu() && x.is_contiguous(), "a contiguous tensor on the CPU is wanted");
  check_fits(board, x.nbytes());
  const uint32_t operation = board.begin();
  if (board.rank() == root) memcpy(board.part(root, operation), bytes(x), x.nbytes());
  board.post(operation);
  board.await_one(operation, root);
  if (board.rank() != root) memcpy(bytes(x), board.part(root, operation), x.nbytes());
  board.take(operation);
}

void raise_group_broken(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const Broken& broken) {
    const auto kind = pybind11::module_::import("moestro.router.collectives").attr("GroupBroken");
    PyErr_SetString(kind.ptr(), broken.what());
  }
}

}  // namespace
}  // namespace moestro

PYBIND11_MODULE(moestro_board, m) {
  using namespace moestro;
  using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.attr("TOKEN_BYTES") = kTokenBytes;
  pybind11::register_local_exception_translator(&raise_group_broken);
  m.def("segment_bytes", &Board::segment_bytes);
  m.def("prepare", &Board::prepare);
  pybind11::class_<Board>(m, "Board")
      .def(pybind11::init<int, int, int, size_t, int64_t, int64_t, std::vector<int>>())
      .def_property_readonly("rank", &Board::rank)
      .def_property_readonly("size", &Board::size)
      .def_property_readonly("part_bytes", &Board::part_bytes)
      .def_property_readonly("operations", &Board::operations)
      .def("close", &Board::close)
      .def("post_tokens", &post_tokens, NoGil())
      .def("take_rows", &take_rows, NoGil())
      .def("post_rows", &post_rows, NoGil())
      .def("sum_rows", &sum_rows, NoGil())
      .def("all_gather", &all_gather, NoGil())
      .def("sum", &sum, NoGil())
      .def("broadcast_", &broadcast_, NoGil());
}
