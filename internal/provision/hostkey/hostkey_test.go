package hostkey

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
)

func TestGenerate(t *testing.T) {
	seen := map[string]bool{}
	for range 3 {
		keys, err := Generate()
		if err != nil {
			t.Fatal(err)
		}
		if len(keys) != 2 || keys[0].Type != "ed25519" || keys[1].Type != "ecdsa" {
			t.Fatalf("types %v", keys)
		}
		for _, k := range keys {
			again, err := Parse(k.Private)
			if err != nil || again.Type != k.Type || string(again.Public) != string(k.Public) {
				t.Errorf("%s: read again it is %q, %v", k.Type, again.Public, err)
			}
			if _, _, _, rest, err := ssh.ParseAuthorizedKey(k.Public); err != nil || len(rest) > 0 {
				t.Errorf("%s: public key %q: %v", k.Type, k.Public, err)
			}
			if seen[string(k.Public)] {
				t.Errorf("%s: the same key twice", k.Type)
			}
			seen[string(k.Public)] = true
		}
	}
}

func TestParse(t *testing.T) {
	pemOf := func(bits int) []byte {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)})
	}
	if k, err := Parse(pemOf(2048)); err != nil || k.Type != "rsa" || !strings.HasPrefix(string(k.Public), "ssh-rsa ") || !strings.Contains(string(k.Private), "OPENSSH") {
		t.Errorf("rsa: %q, %v", k.Public, err)
	}
	good, _ := Generate()
	block, _ := pem.Decode(good[0].Private)
	raw, _ := ssh.ParseRawPrivateKey(good[0].Private)
	locked, err := ssh.MarshalPrivateKeyWithPassphrase(raw, "", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		data []byte
		want string
	}{
		"short":      {pemOf(1024), "too short"},
		"public":     {good[0].Public, "public key"},
		"passphrase": {pem.EncodeToMemory(locked), "passphrase"},
		"cut":        {pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes[:50]}), "not a private key"},
		"empty":      {nil, "not a private key"},
	} {
		if _, err := Parse(tc.data); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func BenchmarkGenerate(b *testing.B) {
	for b.Loop() {
		if _, err := Generate(); err != nil {
			b.Fatal(err)
		}
	}
}
