#include "../cpu/best_fit.h"

#include "arguments.h"
#include "functions.h"
#include "tensors.h"

namespace vlm_fuse {

// best_fit(needs, order, budgets, rows): int64 tensors (samples, budgets), (samples,), and (samples,) to be written
PyObject* py_best_fit(PyObject* const* args) {
  BestFit asked;
  const dlpack::Tensor needs = tensor(args[0], "needs");
  const Items budgets(args[2], "budgets: expected a tuple of ints");
  if (needs.ndim != 2 || budgets.size() < 1 || budgets.size() > kMostBudgets || needs.shape[1] != budgets.size()) {
    refuse(PyExc_ValueError, "needs: expected (samples, budgets), and one to four budgets");
  }
  asked.samples = needs.shape[0];
  asked.budgets = static_cast<int>(budgets.size());
  asked.needs = flat<int64_t>(needs, -1, "needs");
  asked.order = flat<int64_t>(args[1], asked.samples, "order");
  for (int i = 0; i < asked.budgets; ++i) asked.capacity[i] = whole(budgets[i]);
  int64_t* rows = flat<int64_t>(args[3], asked.samples, "rows");
  if (!without_gil(asked.samples * 1024, [&] { return best_fit(asked, rows); })) {
    refuse(PyExc_ValueError, "order: not every sample once, or a sample that needs more than a row has");
  }
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse
