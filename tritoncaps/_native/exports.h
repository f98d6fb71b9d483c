// What the files of the C interface share.
#pragma once

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

template <class T> const T* as(const void* x) { return static_cast<const T*>(x); }
template <class T> T* as(void* x) { return static_cast<T*>(x); }

}  // namespace
