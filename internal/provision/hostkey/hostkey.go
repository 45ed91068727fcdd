// Package hostkey makes and reads the keys by which a machine's SSH server shows who it is. It keeps nothing. A leaf; safe for
// concurrent use.
package hostkey

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"golang.org/x/crypto/ssh"
)

// Key is a host key as sshd has it in its files.
type Key struct {
	Type    string // ed25519, ecdsa, rsa
	Private []byte // OpenSSH's PEM
	Public  []byte // one line
}

// Generate makes a machine's keys: ed25519 and ecdsa. An rsa key takes hundreds of times as long, and no client of today needs one.
func Generate() ([]Key, error) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generating an SSH host key: %w", err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generating an SSH host key: %w", err)
	}
	var keys []Key
	for _, private := range []crypto.Signer{ed, ec} {
		k, err := key(private)
		if err != nil {
			return nil, fmt.Errorf("generating an SSH host key: %w", err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// minRSA is what today's policies of distributions ask for; OpenSSH's own default of RequiredRSASize is 1024.
const minRSA = 2048

// Parse reads a private key in any form that OpenSSH reads.
func Parse(private []byte) (Key, error) {
	raw, err := ssh.ParseRawPrivateKey(private)
	if missing := (*ssh.PassphraseMissingError)(nil); errors.As(err, &missing) {
		return Key{}, hint.With(fmt.Errorf("it is protected by a passphrase: %w", errdefs.ErrInvalidArgument), "take the passphrase off a copy: ssh-keygen -p -N '' -f COPY")
	}
	if err != nil {
		if _, _, _, _, notPrivate := ssh.ParseAuthorizedKey(private); notPrivate == nil {
			return Key{}, hint.With(fmt.Errorf("it is a public key: %w", errdefs.ErrInvalidArgument), "give the private key, which is in the file without .pub")
		}
		return Key{}, hint.With(fmt.Errorf("it is not a private key: %w", errdefs.ErrInvalidArgument), "make one: ssh-keygen -t ed25519 -N '' -f ssh_host_ed25519_key")
	}
	switch k := raw.(type) {
	case *ed25519.PrivateKey:
		return key(*k)
	case *ecdsa.PrivateKey:
		return key(k)
	case *rsa.PrivateKey:
		if bits := k.N.BitLen(); bits < minRSA {
			return Key{}, hint.With(fmt.Errorf("an rsa key of %d bits is too short: %w", bits, errdefs.ErrInvalidArgument), "make one: ssh-keygen -t ed25519 -N '' -f ssh_host_ed25519_key")
		}
		return key(k)
	}
	return Key{}, hint.With(fmt.Errorf("sshd takes no key of type %T: %w", raw, errdefs.ErrInvalidArgument), "give an ed25519, ecdsa or rsa key")
}

func key(private crypto.Signer) (Key, error) {
	public, err := ssh.NewPublicKey(private.Public())
	if err != nil {
		return Key{}, err
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		return Key{}, err
	}
	k := Key{Private: pem.EncodeToMemory(block), Public: ssh.MarshalAuthorizedKey(public)}
	switch private.(type) {
	case ed25519.PrivateKey:
		k.Type = "ed25519"
	case *ecdsa.PrivateKey:
		k.Type = "ecdsa"
	default:
		k.Type = "rsa"
	}
	return k, nil
}

// IsPrivate says whether data holds a private key, which nobody gives away on purpose.
func IsPrivate(data []byte) bool {
	return bytes.Contains(data, []byte("PRIVATE KEY-----"))
}
