package cli

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"ambient-emulator/ztunnel-emulator/internal/accesslog"
)

func TestLogLevel(t *testing.T) {
	for _, tt := range []struct {
		flag, env string
		want      slog.Level // the least that is printed
	}{
		{"", "", slog.LevelInfo},
		{"debug", "", slog.LevelDebug},
		{"warn", "debug", slog.LevelWarn}, // the flag beats it
		{"", "ERROR", slog.LevelError},
		{"", "trace", accesslog.LevelTrace},
		{"", "off", accesslog.LevelOff},
		{"", "debug,h2=off, hyper=warn", slog.LevelDebug},
		{"", "warn,debug", slog.LevelDebug},
		{"", "access=debug", slog.LevelInfo},
		{"", "access", slog.LevelInfo},
		{"", "h2[{peer=1}]=trace,error", slog.LevelError},
	} {
		t.Setenv("LOG_FORMAT", "")
		t.Setenv("RUST_LOG", tt.env)
		l := logging{level: tt.flag}
		log, err := l.logger(io.Discard)
		if err != nil {
			t.Errorf("%q, RUST_LOG=%s: %v", tt.flag, tt.env, err)
			continue
		}
		ctx := context.Background()
		if !log.Enabled(ctx, tt.want) || log.Enabled(ctx, tt.want-1) {
			t.Errorf("%q, RUST_LOG=%s: the least that is printed is not %v", tt.flag, tt.env, tt.want)
		}
	}
}

func TestLogFormat(t *testing.T) {
	for _, tt := range []struct{ flag, env, want string }{
		{"", "", "Z\tinfo\tapp\tm\t\n"},
		{"", "plain", "Z\tinfo\tapp\tm\t\n"},
		{"plain", "json", "Z\tinfo\tapp\tm\t\n"},
		{"", "json", `"scope":"ztunnel::app","message":"m"}` + "\n"},
		{"json", "no format", `"scope":"ztunnel::app","message":"m"}` + "\n"},
	} {
		t.Setenv("LOG_FORMAT", tt.env)
		t.Setenv("RUST_LOG", "")
		var b strings.Builder
		l := logging{format: tt.flag}
		log, err := l.logger(&b)
		if err != nil {
			t.Errorf("%q, LOG_FORMAT=%s: %v", tt.flag, tt.env, err)
			continue
		}
		log.Info("m")
		if !strings.HasSuffix(b.String(), tt.want) {
			t.Errorf("%q, LOG_FORMAT=%s: %q, want …%q", tt.flag, tt.env, b.String(), tt.want)
		}
	}
}

func TestLogWords(t *testing.T) {
	for _, tt := range []struct{ format, level, env, want string }{
		{"xml", "", "", "--log-format xml: it takes plain or json"},
		{"", "", "JSON", "LOG_FORMAT=JSON: it takes plain or json"},
		{"", "loud", "", "--log-level loud: it takes error, warn, info or debug"},
	} {
		t.Setenv("LOG_FORMAT", tt.env)
		l := logging{format: tt.format, level: tt.level}
		_, err := l.logger(io.Discard)
		var usage usageError
		if !errors.As(err, &usage) || err.Error() != tt.want {
			t.Errorf("%+v: %v, want the usage error %q", tt, err, tt.want)
		}
	}
}
