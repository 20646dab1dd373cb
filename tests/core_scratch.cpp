// Scratch between takers and the two places that its memory comes from, of which large blocks' is replaced here.
#include "core/scratch.h"

#include <cstdio>
#include <cstdlib>
#include <set>

#include "core/pages.h"

namespace panda {

static std::set<void*> of_pages;

void* take_pages(int64_t bytes) {
  void* data = std::malloc(size_t(bytes));
  of_pages.insert(data);
  return data;
}

void give_pages(void* data) {
  if (!of_pages.erase(data)) {
    std::puts("given to the pages, which it did not come from");
    std::exit(1);
  }
  std::free(data);
}

}  // namespace panda

int main() {
  for (size_t bytes = 0; bytes < size_t(4) << 20; bytes += 1021) panda::give_scratch(panda::take_scratch(bytes));
  if (panda::of_pages.empty()) return 0;
  std::puts("taken from the pages and not given back");
  return 1;
}
