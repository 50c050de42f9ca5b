// Command ztunnel-emulator plays ztunnel: it takes pods' network namespaces
// from a Unix socket and serves listeners inside them.
package main

import (
	"os"
	"runtime"

	"ambient-emulator/ztunnel-emulator/internal/cli"
)

// The main thread is locked away before anything runs, so that no teleport ever
// uses it: the runtime could not destroy it if it failed to come back
// (golang/go#34031).
func init() { runtime.LockOSThread() }

func main() { os.Exit(cli.Main(os.Args[1:], os.Stdout, os.Stderr)) }
