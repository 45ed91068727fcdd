// Package form says how words are written that go to the guest's own programs, whatever language they came in: a word that passes can
// stand on a command line and in a line of a file. A leaf, imported by provision and its languages.
package form

import "regexp"

var (
	user     = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_.-]{0,30}\$?$`) // useradd(8) of the distributions
	hash     = regexp.MustCompile(`^(\$(1|2[abxy]|5|6|7|y|gy|sha1|md5)\$[!-9;-~]+|[!*]+)$`)
	locale   = regexp.MustCompile(`^(C|POSIX|[a-z]{2,3}(_[A-Z]{2})?)(\.[A-Za-z0-9-]+)?(@[a-z]+)?$`)
	host     = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,252}[a-zA-Z0-9])?$`)
	software = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9+._:=~@/<>-]{0,199}$`)
)

// User says whether s is the name of a user or a group.
func User(s string) bool { return user.MatchString(s) }

// PasswordHash says whether s is a hash of crypt(5), or locks a password.
func PasswordHash(s string) bool { return hash.MatchString(s) }

// Locale says whether s is a locale, as de_DE.UTF-8.
func Locale(s string) bool { return locale.MatchString(s) }

// Host says whether s is the name of a host.
func Host(s string) bool { return host.MatchString(s) }

// Package says whether s is the name of a package, with =VERSION or without.
func Package(s string) bool { return software.MatchString(s) }
