// The threads of the OpenMP runtime that torch has loaded: its functions arrive through `use_threads`.

#pragma once

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads. One copy in a library, whatever the number of its sources.
// Hidden: else two libraries that one process loads would share them.
#pragma GCC visibility push(hidden)
inline Parallel parallel = nullptr;
inline Number thread_number = nullptr, number_of_threads = nullptr;
#pragma GCC visibility pop

// Call body(number of the thread, number of threads) in each thread.
template <class Body>
void in_threads(int threads, Body body) {
    if (threads <= 1 || parallel == nullptr) {
        body(0L, 1L);
        return;
    }
    parallel([](void* of) { (*static_cast<Body*>(of))(long(thread_number()), long(number_of_threads())); }, &body,
             unsigned(threads), 0);
}
