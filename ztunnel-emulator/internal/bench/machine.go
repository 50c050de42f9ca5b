package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// resultsFile is RESULTS.md: the table and the machine that made it.
func resultsFile(table string) string {
	return "# What it costs\n\n" +
		"Written by `scripts/bench/run`.\n\n" + machine() + "\n" + table
}

// machine describes where this runs, without saying which one it is.
func machine() string {
	var uts unix.Utsname
	kernel := "unknown"
	if unix.Uname(&uts) == nil {
		kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	unix.Sysinfo(&info)
	memory := float64(info.Totalram) * float64(info.Unit) / (1 << 30)
	return fmt.Sprintf("%s: Linux %s, %s, %d cores, %.0f GiB of memory, %s.\n",
		time.Now().UTC().Format(time.DateOnly), kernel, cpuModel(), runtime.NumCPU(), memory, runtime.Version())
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range bytes.Lines(b) {
		if key, value, ok := strings.Cut(string(line), ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "a CPU without a name (" + runtime.GOARCH + ")"
}
