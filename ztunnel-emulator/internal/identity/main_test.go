package identity_test

import (
	"os"
	"runtime"
	"testing"

	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if dir := os.Getenv(openerDir); dir != "" {
		openerMain(dir)
		return
	}
	testmain.Run(m)
}
